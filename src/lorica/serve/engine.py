"""The promises of an engine and of a store of adapters: the seam between them and the endpoints above.

    admit(prompt, adapter, sampling) ──▶ Answer ──▶ Step, Step, ..., Step with `finish`
    Entry: the store's knowledge of one adapter

Nothing heavy is imported here, so that endpoints and their tests can stand on this file alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from lorica.errors import LoricaError


class InvalidRequest(LoricaError, ValueError):
    """A request cannot be answered as it stands (HTTP 400).

    Args:
        message: the expected value and the given one.
        param: name of the field that it is about, as in `Sampling`; ``"prompt"`` and ``"adapter"`` beside
            those.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownAdapter(LoricaError, LookupError):
    """No adapter of that name is served (HTTP 404); the message lists near names."""


class RefusedAdapter(LoricaError, ValueError):
    """An adapter is there and cannot be served (HTTP 400); the message says why."""


class Overloaded(LoricaError, RuntimeError):
    """The queue is full, or a request waited in it for too long (HTTP 429).

    Args:
        message: which of these.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDown(LoricaError, RuntimeError):
    """The engine is not running (HTTP 503): not started, stopping, starting again, or dead.

    Args:
        message: which of these.
        retry_after: seconds after which it may be back; None where it will not.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Settings by which one answer is drawn.

    Args:
        max_tokens: at most so many; 0 only together with `prompt_logprobs`.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: draw among so many of the most likely; 0 for all.
        top_p: draw among the most likely that have this probability together.
        min_p: leave out tokens with less than this share of the most likely one's probability.
        seed: of a generator of the request's own: the same answer whoever else is in the batch. None draws
            one.
        stop: texts that end the answer; they are never part of it.
        stop_token_ids: tokens that end it, beside the model's own.
        ignore_eos: whether the model's own do not end it.
        presence_penalty: taken off the logits of tokens that the answer has already.
        frequency_penalty: taken off for each time that it has them.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the prompt
            or the answer has.
        logit_bias: token id, number that is added to its logit.
        logprobs: None for none; 0 for the chosen token's; k for the k most likely as well. They are of the
            model's own distribution, before temperature, penalties and bias.
        prompt_logprobs: the same for the prompt's tokens.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer or a prompt.

    Args:
        id: of the token.
        logprob: natural logarithm of its probability; None where it was not asked for, and for a prompt's
            first token.
        top: the most likely tokens there and their logarithms, the likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """Some more of one answer.

    Args:
        text: held back while it may be part of a character or of a stop text, so that it may be empty where
            `tokens` are not, and come later.
        tokens: those that came.
        finish: set on the last step alone: ``"stop"`` (the model's end, or one of the request's),
            ``"length"``.
        prompt: the prompt's tokens, on the first step, where `prompt_logprobs` were asked for.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: Literal["stop", "length"] | None = None
    prompt: tuple[Token, ...] = ()


class Answer(Protocol):
    """Steps of one answer as they come.

    Closing it, or leaving it to the garbage collector, cancels the request, and frees its blocks and its
    lease of the adapter. What is found out only while the adapter loads (`RefusedAdapter`), and an engine
    that dies (`EngineDown`), is raised by the next step: wait for the first one before answering 200.
    """

    def __aiter__(self) -> AsyncIterator[Step]: ...

    async def __anext__(self) -> Step: ...

    async def aclose(self) -> None:
        """Cancel the rest."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The store's knowledge of one adapter.

    Args:
        name: under which it is served.
        state: ``"listed"`` (a folder), ``"loading"``, ``"resident"`` (in memory, fitted to the base),
            ``"mounted"`` (in a slot), ``"refused"`` (`problem` says why).
        path: its folder.
        hash: sha256 of its configuration and tensors, in hexadecimal; None before it was read.
        rank: the largest of its modules'.
        applied: modules of the base that it acts on; None before it was read.
        total: modules that its file has something for.
        size: bytes of its file.
        pinned: whether it is never evicted.
        requests: those that hold it now, waiting ones included.
        served: those that it has answered since the server started.
        loaded: seconds since the epoch, when it was read last; None before.
        problem: why it was refused.
        template: the chat template that its folder brings; None: the base's holds.
    """

    name: str
    state: Literal["listed", "loading", "resident", "mounted", "refused"]
    path: Path | None = None
    hash: str | None = None
    rank: int | None = None
    applied: int | None = None
    total: int | None = None
    size: int = 0
    pinned: bool = False
    requests: int = 0
    served: int = 0
    loaded: float | None = None
    problem: str | None = None
    template: str | None = None


class Adapters(Protocol):
    """The store, as endpoints see it.

    Names are aliases of contents: what is loaded under a name again holds for new requests, and those that
    run finish on what they began with.
    """

    def entries(self) -> list[Entry]:
        """Every adapter, by name."""
        ...

    def entry(self, name: str) -> Entry:
        """One of them.

        Raises:
            UnknownAdapter: nothing has this name.
        """
        ...

    async def load(
        self, name: str, path: str | Path | None = None, *, pin: bool = False, replace: bool = False
    ) -> Entry:
        """Read an adapter into memory, away from the event loop.

        Args:
            name: to serve it under.
            path: its folder, within one of the store's roots; None for one that is listed already.
            pin: never evict it.
            replace: whether the name may be taken already.

        Raises:
            RefusedAdapter: it cannot be served, or the name cannot be one, or the path is outside the roots.
            UnknownAdapter: there is no such folder, or none of that name is listed.
        """
        ...

    async def unload(self, name: str) -> None:
        """Stop serving a name; requests that hold the adapter finish, then its memory is freed.

        Raises:
            UnknownAdapter: nothing has this name.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a request.

    Args:
        context: tokens of prompt and answer together.
        vocabulary: token ids are below it.
        logprobs: the largest `logprobs` and `prompt_logprobs`.
        stops: the largest number of stop texts, and of stop tokens.
        stop_length: characters of one stop text.
        biases: entries of `logit_bias`.
        queue: requests that may wait.
    """

    context: int
    vocabulary: int
    logprobs: int = 20
    stops: int = 16
    stop_length: int = 256
    biases: int = 300
    queue: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts for /metrics; those that end in ``_total`` only grow.

    Args:
        waiting: requests that are not in the batch yet.
        running: requests in the batch.
        cache_use: share of the cache's blocks that requests hold, 0 to 1.
        slots: for adapters.
        mounted: names of the adapters in slots, content by content.
        running_adapters: names that running requests use.
        waiting_adapters: names that waiting requests use.
        prompt_tokens_total: tokens of prompts that were admitted.
        cached_tokens_total: of those, tokens that the prefix cache had.
        generated_tokens_total: tokens of answers.
        steps_total: forward passes.
        mounts_total: copies of an adapter into a slot.
        evictions_total: adapters that left a slot for another.
        slot_waits_total: requests that waited for a slot.
        restarts_total: times that the engine was started again after it died.
        timeouts_total: requests that waited too long, and were refused.
    """

    waiting: int = 0
    running: int = 0
    cache_use: float = 0.0
    slots: int = 0
    mounted: tuple[str, ...] = ()
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    steps_total: int = 0
    mounts_total: int = 0
    evictions_total: int = 0
    slot_waits_total: int = 0
    restarts_total: int = 0
    timeouts_total: int = 0


class Engine(Protocol):
    """One base and the adapters mounted on it."""

    tokenizer: Any

    @property
    def adapters(self) -> Adapters:
        """The store."""
        ...

    @property
    def limits(self) -> Limits:
        """The limits of a request."""
        ...

    @property
    def stats(self) -> Stats:
        """Counts of now."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it takes requests: started, not stopping, and its thread is not dead."""
        ...

    def admit(
        self, prompt: Sequence[int], adapter: str | None, sampling: Sampling, *, tenant: str = ""
    ) -> Answer:
        """Check and queue one request, from the event loop that `start` ran in; waits for nothing.

        Args:
            prompt: token ids.
            adapter: name of an adapter, or None for the base.
            sampling: how the answer is drawn.
            tenant: requests of different tenants share no cached prefix.

        Raises:
            InvalidRequest: it does not fit, or a field has a value that cannot be.
            UnknownAdapter: none is served under that name.
            RefusedAdapter: the adapter of that name cannot be served.
            Overloaded: the queue is full.
            EngineDown: the engine does not run.
        """
        ...

    async def start(self) -> None:
        """Begin to serve, in the event loop that runs."""
        ...

    async def stop(self, *, drain: float | None = None) -> None:
        """Take no more requests, and end.

        Args:
            drain: seconds that requests which were admitted have to finish; None ends them at once with
                `EngineDown`.
        """
        ...
