"""Training as a service: clients write the loop, one process holds the base and everybody's adapters.

engine/   one base, many adapters: passes, samples, whose turn it is; several/: engines as processes
state/    the durable part: runs, calls, checkpoints, tenants, in one folder
http/     the training protocol, for its official SDK
files     an adapter in training, as files
wire      requests and results as bytes
client    the verbs in one process, without a server
errors    the errors that clients get
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorica.service.client import Client as Client
    from lorica.service.client import Training as Training
    from lorica.service.engine.base import Base as Base
    from lorica.service.engine.datum import Datum as Datum
    from lorica.service.engine.drawing import Draw as Draw
    from lorica.service.engine.weights import Adam as Adam
    from lorica.service.state.service import Service as Service
    from lorica.service.state.tenants import Tenant as Tenant
    from lorica.service.state.tenants import Tenants as Tenants

_PLACES = {
    "Client": "client",
    "Training": "client",
    "Datum": "engine.datum",
    "Draw": "engine.drawing",
    "Adam": "engine.weights",
    "Base": "engine.base",
    "Service": "state.service",
    "Tenant": "state.tenants",
    "Tenants": "state.tenants",
}

__all__ = ["Adam", "Base", "Client", "Datum", "Draw", "Service", "Tenant", "Tenants", "Training"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found
