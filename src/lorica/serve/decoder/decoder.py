"""`Decoder`: answers requests for one base and any number of adapters, from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import secrets
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lorica.errors import StateError
from lorica.model.slots import Slots
from lorica.serve.decoder import admission
from lorica.serve.decoder.answers import Channel, DecodedAnswer, Request, too_late
from lorica.serve.decoder.batching import Batcher, bytes_per_token, capacity, check_model, check_version
from lorica.serve.decoder.schedule import Schedule, Told
from lorica.serve.engine import EngineDown, Limits, Overloaded, Sampling, Stats
from lorica.serve.store import Content, Store

log = logging.getLogger("lorica.serve")

_WORDS = 16
_SHARE = 4
"""The cache takes at most one in so many bytes of the memory that is free."""
_HEALTHY = 600.0
"""Seconds after which an engine that was started again may be once more."""


class Decoder:
    """An engine for decoders: requests of many adapters share each step, and the base runs once for all.

        engine = lorica.serve.Decoder(model, tokenizer, adapters="adapters/", slots=32)
        async with engine:
            async for step in engine.admit(ids, "support-v2", Sampling(max_tokens=64)):
                print(step.text, end="")

    transformers' continuous batching underneath. Each answer is what its adapter gives alone: in float32 to
    rounding, in half precision to near ties, which fall with the shape of the batch.

    Args:
        model: a decoder of transformers, in evaluation; it keeps its classes and names.
        tokenizer: writes the text of answers; None leaves it to the caller, who then has tokens alone.
        adapters: folders that hold adapters' folders (or one adapter), listed at once and watched.
        slots: adapters in the batch together; more are served, and take turns.
        max_rank: larger ranks are refused.
        context: tokens of prompt and answer together; None for the model's, as far as memory allows.
        cache_tokens: tokens that the cache has room for; None chooses by the model and the memory.
        requests: in the batch together.
        batch_tokens: in a step; longer prompts take several.
        page: tokens in a block of the cache: prefixes are shared block by block.
        queue: requests that may wait besides.
        patience: seconds that a request may wait for a slot while others' adapters keep theirs.
        wait: seconds after which a request that is in no batch yet is refused (`Overloaded`); None for never.
        resident: adapters kept in memory.
        watch: seconds between two looks at the folders; 0 for none.
        restarts: times that an engine which died is started again, within ten minutes.

    Raises:
        StateError: the model is no decoder that can be batched so, or adapters are merged into its weights.
        MissingExtra: another version of transformers is installed than the one that the engine steers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        adapters: str | Path | Sequence[str | Path] = (),
        slots: int = 32,
        max_rank: int = 64,
        context: int | None = None,
        cache_tokens: int | None = None,
        requests: int = 32,
        batch_tokens: int = 256,
        page: int = 16,
        queue: int = 1024,
        patience: float = 1.0,
        wait: float | None = None,
        resident: int = 256,
        watch: float = 2.0,
        restarts: int = 1,
    ) -> None:
        check_version()
        check_model(model)
        self.model, self.tokenizer = model, tokenizer
        self.slots = Slots(model, slots, max_rank=max_rank)
        roots = (adapters,) if isinstance(adapters, (str, Path)) else tuple(adapters)
        self._roots, self._resident, self._watch = roots, max(resident, slots), watch
        self._store: Store | None = None
        context, blocks = _sizes(model, context, cache_tokens, requests, page)
        self._sizes = {
            "page": page,
            "blocks": blocks,
            "tokens": max(batch_tokens, requests),
            "requests": requests,
        }
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self._limits = Limits(context=context, vocabulary=vocabulary, queue=queue)
        self._ends = _ends(model)
        self._secret = secrets.token_bytes(32)
        self._open: dict[str, Request] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._batcher: Batcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state = "not started"
        self._task: asyncio.Future[None] | None = None
        self._restarts, self._allowed, self._born = 0, restarts, 0.0
        self._lives = restarts
        self._schedule = Schedule(
            model,
            self.slots,
            requests=requests,
            chunk=batch_tokens,
            patience=patience,
            wait=wait,
            tell=self._from_thread,
            ended=self._thread_ended,
        )
        self._over = asyncio.Event()

    # What a request needs.

    @property
    def adapters(self) -> Store:
        """The store.

        Raises:
            EngineDown: the engine was not started yet.
        """
        if self._store is None:
            raise EngineDown("the engine is not started: await engine.start()")
        return self._store

    @property
    def limits(self) -> Limits:
        """The limits of a request."""
        return self._limits

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._state == "running" and self._batcher is not None and self._batcher.is_running()

    @property
    def leases(self) -> int:
        """Holds of requests on adapters."""
        return 0 if self._store is None else self._store.leases

    @property
    def blocks_held(self) -> int:
        """Blocks of the cache that requests hold."""
        return 0 if self._batcher is None else self._batcher.blocks_held

    @property
    def stats(self) -> Stats:
        """Counts of now."""
        counts, running = self._schedule.counts, list(self._schedule.running.values())
        inside = {request.id for request in running}
        waiting = [request for request in self._open.values() if request.id not in inside]
        names = {id(a.content): n for n, a in (self._store.names if self._store else {}).items()}
        blocks = self._sizes["blocks"]
        totals: dict[str, Any] = {f"{name}_total": n for name, n in dataclasses.asdict(counts).items()}
        return Stats(
            waiting=len(waiting),
            running=len(running),
            cache_use=self.blocks_held / blocks,
            slots=self.slots.capacity,
            mounted=tuple(names.get(id(c), c.hash[:12]) for c in self._schedule.mounted),
            running_adapters=tuple(sorted({r.name for r in running if r.name is not None})),
            waiting_adapters=tuple(sorted({r.name for r in waiting if r.name is not None})),
            **totals,
            restarts_total=self._restarts,
        )

    def admit(
        self, prompt: Sequence[int], adapter: str | None, sampling: Sampling, *, tenant: str = ""
    ) -> DecodedAnswer:
        """Check and queue one request; waits for nothing. See `Engine.admit`."""
        if not self.alive:
            raise EngineDown(f"the engine is {self._state}", retry_after=self._retry_after())
        admission.check(prompt, sampling, self._limits, writes=self.tokenizer is not None)
        most = self._limits.queue + self._schedule.requests
        if len(self._open) >= most:
            raise Overloaded(f"{most:,} requests are in the engine, which is all it takes", retry_after=1.0)
        lease = None if adapter is None else self.adapters.lease(adapter)
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._ends)
        request = Request(
            uuid.uuid4().hex, list(prompt), sampling, ends, Channel(), lease=lease, name=adapter
        )
        self._open[request.id] = request
        if lease is None or lease.content is not None:
            self._submit(request, tenant)
        else:
            self._loading[request.id] = asyncio.create_task(self._submit_read(request, tenant))
        return DecodedAnswer(request, self.tokenizer, self._cancel, self._left)

    def _submit(self, request: Request, tenant: str) -> None:
        content = request.content
        request.space = self._space("" if content is None else content.hash, tenant)
        self._schedule.submit(request)
        if self._batcher is not None:
            self._batcher.wake()

    async def _submit_read(self, request: Request, tenant: str) -> None:
        assert request.lease is not None
        wait = self._schedule.wait
        try:
            async with asyncio.timeout(wait):
                await request.lease.ready()
        except Exception as error:
            if isinstance(error, TimeoutError) and wait is not None:
                error = too_late(wait)
                self._schedule.counts.timeouts += 1
            self._close(request)
            request.channel.fail(error)
        else:
            if request.id in self._open:
                self._submit(request, tenant)
        finally:
            self._loading.pop(request.id, None)

    def _cancel(self, request: Request) -> None:
        if request.id in self._loading:
            self._close(request)
        elif request.id in self._open:
            self._schedule.cancel(request)
            if self._batcher is not None:
                self._batcher.wake()

    def _left(self, request: Request) -> None:
        self._in_loop(self._cancel, request)

    def _close(self, request: Request, *, served: bool = False) -> None:
        if self._open.pop(request.id, None) is not None and request.lease is not None:
            request.lease.release(served=served)
        if not self._open:
            self._over.set()

    def _space(self, content: str, tenant: str) -> tuple[int, ...]:
        """The namespace of a prefix: by content and tenant, in numbers that nobody can guess."""
        key = hashlib.blake2b(f"{content}\0{tenant}".encode(), digest_size=4 * _WORDS, key=self._secret)
        digest = key.digest()
        words = (int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4))
        return tuple(word & 0x7FFFFFFF for word in words)

    # Told by the engine's thread.

    def _from_thread(self, told: Sequence[Told], over: Sequence[Request]) -> None:
        self._in_loop(self._told, list(told), list(over))

    def _thread_ended(self, error: BaseException | None) -> None:
        self._in_loop(self._ended, error)

    def _in_loop(self, call: Any, *args: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
            self._loop.call_soon_threadsafe(call, *args)

    def _told(self, told: Sequence[Told], over: Sequence[Request]) -> None:
        finished = set()
        for request, tokens, finish, prompt, error in told:
            if error is not None:
                request.channel.fail(error)
                continue
            request.channel.tell(tokens, finish, prompt)
            if finish is not None:
                finished.add(request.id)
        for request in over:
            self._close(request, served=request.id in finished)

    def _ended(self, error: BaseException | None) -> None:
        """The engine's thread is gone: clients that wait are told so, and it is started again if it died."""
        for task in self._loading.values():
            task.cancel()
        self._loading.clear()
        stopping = self._state in ("stopping", "stopped")
        said = "the engine was stopped" if error is None or stopping else f"the engine died: {error}"
        self._schedule.reset()
        if time.monotonic() - self._born > _HEALTHY:
            self._lives = self._allowed
        again = not stopping and self._lives > 0
        if not stopping:
            log.error("%s; %s", said, "it is started again" if again else "it stays down")
            self._state = "starting again, after it died" if again else "dead"
        for request in list(self._open.values()):
            self._close(request)
            request.channel.fail(EngineDown(said, retry_after=1.0 if again else None))
        if again:
            self._lives -= 1
            self._restarts += 1
            self._task = asyncio.ensure_future(self._begin())

    # Its life.

    async def start(self) -> None:
        """Begin to serve, in the event loop that runs."""
        if self._state not in ("not started", "stopped"):
            raise StateError(f"the engine is {self._state}; it cannot be started")
        self._loop = asyncio.get_running_loop()
        if self._store is None:
            self._store = Store(
                lambda adapter, folder: self.slots.fit(adapter),
                self._roots,
                max_rank=self.slots.max_rank,
                resident=self._resident,
                dropped=self._dropped,
            )
        if self._watch and self._roots:
            self._store.watch(self._watch)
        await self._begin()

    async def stop(self, *, drain: float | None = None) -> None:
        """Take no more requests, and end. See `Engine.stop`."""
        if self._state in ("not started", "stopped"):
            return
        self._state = "stopping"
        if drain is not None and self._open:
            self._over.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), drain)
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            await asyncio.to_thread(batcher.stop, block=True, timeout=60, hard_stop=True)
        await asyncio.sleep(0)  # what the thread said last
        self._ended(None)
        if self._store is not None:
            await self._store.close()
        self._state = "stopped"

    async def __aenter__(self) -> Decoder:
        """Started."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stopped; requests that were admitted are not waited for."""
        await self.stop()

    async def _begin(self) -> None:
        before, self._batcher = self._batcher, None
        if before is not None:
            await asyncio.to_thread(before.stop, block=True, timeout=60, hard_stop=True)
        if self._state in ("stopping", "stopped"):
            return
        try:
            batcher = Batcher(self.model, self._schedule, **self._sizes)
        except Exception:
            self._state = "dead"
            raise
        self._batcher, self._born, self._state = batcher, time.monotonic(), "running"
        batcher.start()

    def _retry_after(self) -> float | None:
        return None if self._state in ("dead", "stopped", "not started", "stopping") else 1.0

    def _dropped(self, content: Content) -> None:
        self._schedule.drop(content)
        if self._batcher is not None:
            self._batcher.wake()


def _ends(model: Any) -> frozenset[int]:
    """Tokens by which the model ends an answer."""
    ids = model.generation_config.eos_token_id
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


def _sizes(
    model: Any, context: int | None, cache_tokens: int | None, requests: int, page: int
) -> tuple[int, int]:
    """Tokens of the longest request, and blocks of the cache."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    if context is not None and context > longest:
        raise StateError(f"context={context:,}, and the model knows {longest:,} positions")
    wanted = longest if context is None else context
    tokens = cache_tokens
    if tokens is None:
        tokens = max(wanted, requests * min(wanted, 512)) + page
        if context is None:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            tokens = min(tokens, max(free // _SHARE // bytes_per_token(model), 16 * page))
    blocks = math.ceil(tokens / page) + 1
    fits = capacity(page, blocks)
    if context is not None and context > fits:
        raise StateError(
            f"context={context:,} needs a cache of as many tokens; cache_tokens={cache_tokens:,}"
        )
    return min(wanted, fits), blocks
