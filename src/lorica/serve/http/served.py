"""The served model: a base under its name, an engine of one kind, a tokenizer, the keys."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from lorica.errors import nearest
from lorica.serve.encoder.engine import EncoderEngine
from lorica.serve.engine import Adapters, Engine, Entry, Limits, Stats, UnknownAdapter
from lorica.serve.http.errors import ApiError, refused
from lorica.serve.http.keys import Key, Keys
from lorica.serve.http.metrics import Metrics
from lorica.serve.http.settings import Settings
from lorica.serve.http.text import Texts


@dataclass(eq=False)
class Served:
    """A base with its adapters, ready to be asked.

    Args:
        model: name of the base.
        engine: that answers.
        settings: the limits of the endpoints.
        keys: who may ask.
        default: the adapter that answers where a request names no model; None: the base.
        own_templates: whether conversations with an adapter are laid out by the chat template that its folder
            brings, where it brings one.
    """

    model: str
    engine: Engine | EncoderEngine
    settings: Settings = field(default_factory=Settings)
    keys: Keys = field(default_factory=Keys)
    default: str | None = None
    own_templates: bool = True

    def __post_init__(self) -> None:
        """Make the parts that depend on the engine."""
        self.texts = Texts(self.engine.tokenizer)
        self.metrics = Metrics(lambda: self.engine.stats, lambda: self.adapters.entries(), self.model)
        self.created = int(time.time())
        self.closing = False

    @property
    def adapters(self) -> Adapters:
        """The store."""
        return self.engine.adapters

    @property
    def limits(self) -> Limits:
        """The engine's."""
        return self.engine.limits

    @property
    def stats(self) -> Stats:
        """The engine's."""
        return self.engine.stats

    @property
    def decoder(self) -> Engine:
        """The engine, where it writes text.

        Raises:
            ApiError: it does not.
        """
        if isinstance(self.engine, EncoderEngine):
            raise refused(
                f"{self.model} reads texts and writes none; ask /classify, /v1/embeddings or /score", "model"
            )
        return self.engine

    @property
    def encoder(self) -> EncoderEngine:
        """The engine, where it reads texts.

        Raises:
            ApiError: it does not.
        """
        if not isinstance(self.engine, EncoderEngine):
            raise refused(
                f"{self.model} writes text, and has neither classes nor embeddings; ask /v1/completions or "
                "/v1/chat/completions",
                "model",
            )
        return self.engine

    def adapter(self, name: str | None, key: Key) -> str | None:
        """The adapter that a request's `model` means; None for the base.

        Args:
            name: the base's name, an adapter's, or both with a colon between.
            key: whose request it is.

        Raises:
            ApiError: nothing has this name for this key; near names are told.
        """
        if name is None:
            return self.default if key.may_use(self.default) else None
        own = name.removeprefix(f"{self.model}:")
        if key.may_use(own):
            with contextlib.suppress(UnknownAdapter):
                return self.adapters.entry(own).name
        if name == self.model:
            return None
        seen = [self.model, *(entry.name for entry in self.seen_by(key))]
        raise ApiError(
            404,
            f"there is no model {name[:200]!r} here{nearest(name[:200], seen)}; /v1/models lists all",
            param="model",
            code="model_not_found",
        )

    def entry(self, name: str, key: Key) -> Entry | None:
        """The entry of an adapter, for a key that may use it; None for the base."""
        found = self.adapter(name, key)
        try:
            return None if found is None else self.adapters.entry(found)
        except UnknownAdapter:  # unloaded meanwhile
            raise ApiError(404, f"there is no model {name[:200]!r}", code="model_not_found") from None

    def template(self, adapter: str | None) -> str | None:
        """The chat template that an adapter brings; None: the base's holds."""
        if adapter is None or not self.own_templates:
            return None
        try:
            return self.adapters.entry(adapter).template
        except UnknownAdapter:  # unloaded meanwhile, which the engine tells
            return None

    def seen_by(self, key: Key) -> Iterable[Entry]:
        """The adapters that a key may use."""
        return (entry for entry in self.adapters.entries() if key.may_use(entry.name))


def served(request: Request) -> Served:
    """The served model of a request's application."""
    return request.app.state.served


def key_of(request: Request) -> Key:
    """The key that a request came with."""
    return request.state.key


def refuse_many(what: str, count: int, most: int, param: str) -> None:
    """Refuse a request that asks for more than it may.

    Raises:
        ApiError: it does.
    """
    if count > most:
        raise refused(f"the request has {count:,} {what}; {most:,} are allowed", param)


def about(entry: Entry) -> dict[str, Any]:
    """Fields of `/v1/models` for an adapter beside OpenAI's and vLLM's."""
    return {
        "rank": entry.rank,
        "modules_applied": entry.applied,
        "modules_total": entry.total,
        "content_hash": entry.hash,
        "bytes": entry.size,
        "state": entry.state,
        "pinned": entry.pinned,
        "requests_running": entry.requests,
        "requests_served": entry.served,
        "problem": entry.problem,
        "chat_template": entry.template is not None,
    }
