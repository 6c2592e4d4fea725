"""Serving: one base for many tenants, each with an adapter of its own, in one batch.

engine    the promises of an engine and of a store of adapters; errors, `Sampling`, `Step`
decoder   an engine for decoders, over transformers' continuous batching: `Decoder`
encoder   an engine for models that read: classes, tags, numbers and vectors: `EncoderEngine`
http      OpenAI's and vLLM's endpoints over an engine, and a page
store     the store of adapters: listed, resident, mounted; leases, eviction, watched folders
ray       replicas of one base on Ray Serve
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorica.serve.engine import Adapters as Adapters
from lorica.serve.engine import Answer as Answer
from lorica.serve.engine import Engine as Engine
from lorica.serve.engine import EngineDown as EngineDown
from lorica.serve.engine import Entry as Entry
from lorica.serve.engine import InvalidRequest as InvalidRequest
from lorica.serve.engine import Limits as Limits
from lorica.serve.engine import Overloaded as Overloaded
from lorica.serve.engine import RefusedAdapter as RefusedAdapter
from lorica.serve.engine import Sampling as Sampling
from lorica.serve.engine import Stats as Stats
from lorica.serve.engine import Step as Step
from lorica.serve.engine import Token as Token
from lorica.serve.engine import UnknownAdapter as UnknownAdapter

if TYPE_CHECKING:
    from lorica.serve.decoder import Decoder as Decoder
    from lorica.serve.encoder import EncoderEngine as EncoderEngine
    from lorica.serve.store import Store as Store

# Imported when first used, and transformers with them.
_PLACES = {"Decoder": "decoder", "EncoderEngine": "encoder", "Store": "store"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
