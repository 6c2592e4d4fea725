"""Endpoints over an engine: OpenAI's and vLLM's, with their fields, errors and streams.

app         the application: endpoints behind the gate, started and stopped with the engine
routes/     completions, conversations, encoders, tokens, models, status
schemas     the fields of requests            answers, stream   answers that run, gathered or sent as events
gate, keys  clients and their limits          errors            OpenAI's error object
served      the served model                  metrics           the text of /metrics
running     a server on a port, until it is told to stop; page.html: the page at /
"""

from __future__ import annotations

from lorica.serve.http.app import make_app as make_app
from lorica.serve.http.keys import Key as Key
from lorica.serve.http.keys import Keys as Keys
from lorica.serve.http.served import Served as Served
from lorica.serve.http.settings import Settings as Settings
