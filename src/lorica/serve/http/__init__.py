"""Endpoints over an engine: OpenAI's and vLLM's, with their fields, errors and streams.

app         the application: endpoints behind the gate, started and stopped with the engine
routes/     completions, conversations, encoders, tokens, models, status
schemas     the fields of requests            answers, stream   answers that run, gathered or sent as events
gate, keys  clients and their limits          errors            OpenAI's error object
served      the served model                  metrics           the text of /metrics
running     a server on a port, until it is told to stop; page.html: the page at /
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorica.serve.http.app import make_app as make_app
    from lorica.serve.http.keys import Key as Key
    from lorica.serve.http.keys import Keys as Keys
    from lorica.serve.http.served import Served as Served
    from lorica.serve.http.settings import Settings as Settings

# Imported when first used, and the engines with them: who passes requests on has none.
_PLACES = {"make_app": "app", "Key": "keys", "Keys": "keys", "Served": "served", "Settings": "settings"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
