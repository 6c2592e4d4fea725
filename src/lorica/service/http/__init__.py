"""The training protocol over HTTP, for its official SDK as it is.

app        an application of its own, and the router that a larger one mounts
protocol   sessions, models, training, sampling, and futures
listing    runs and checkpoints: listed, described, fetched, deleted
sharing    checkpoints published and copied, sessions searched
answers    errors as HTTP has them; who asks
running    a server, in a thread or until it is told to stop
"""

from __future__ import annotations

from lorica.service.http.app import beside as beside
from lorica.service.http.app import make_app as make_app
from lorica.service.http.app import make_router as make_router
from lorica.service.http.app import mount as mount
from lorica.service.http.running import run as run
from lorica.service.http.running import serving as serving
