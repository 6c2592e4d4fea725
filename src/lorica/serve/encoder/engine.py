"""The engine of models that read: rows wait a moment for others, and go through the trunk together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorica.errors import LoricaError
from lorica.serve.encoder.base import Base
from lorica.serve.encoder.batching import ROWS, batches
from lorica.serve.encoder.fitting import Fitted, fit
from lorica.serve.encoder.heads import Head
from lorica.serve.encoder.rows import Row
from lorica.serve.encoder.trunk import Mount, Trunk
from lorica.serve.engine import EngineDown, InvalidRequest, Limits, Overloaded, RefusedAdapter, Stats
from lorica.serve.store import Content, Store

PATIENCE = 0.002
"""Seconds that a row waits for others, where fewer wait than a batch has."""
TOKENS = 8192
"""Tokens that are taken from the queue at a time, to be cut into batches by their lengths."""

log = logging.getLogger("lorica.serve")


@dataclass(frozen=True)
class Using:
    """An adapter, or the base, held by a request.

    Args:
        engine: that answers.
        name: of the adapter; None: the base.
        head: its head; None where it has vectors alone.
        mount: where it is on the trunk; None: the base.
    """

    engine: EncoderEngine
    name: str | None
    head: Head | None
    mount: Mount | None

    async def outputs(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """The head's logits of each row: (labels,), or (tokens, labels) of tags."""
        assert self.head is not None
        return await self.engine.ask(rows, self, self.head)

    async def vectors(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """The vector of each row: (width,)."""
        return await self.engine.ask(rows, self, None)


@dataclass(eq=False)
class Job:
    """One row that waits for its answer.

    Args:
        row: the row.
        using: for which adapter.
        head: whose outputs are wanted; None: its vector is.
        answer: where it goes.
        since: when it was asked for, by the monotonic clock.
    """

    row: Row
    using: Using
    head: Head | None
    answer: asyncio.Future[np.ndarray]
    since: float = field(default_factory=time.monotonic)

    def fail(self, error: Exception) -> None:
        """There is no answer."""
        if not self.answer.done():
            self.answer.set_exception(error)


class EncoderEngine:
    """One model that reads, and the adapters on it.

    Args:
        base: the model.
        adapters: folders that hold adapters' folders (or one adapter), listed at once and watched.
        slots: adapters on the trunk at a time, but for those that are held or pinned.
        max_rank: larger ranks are refused.
        queue: rows that may wait.
        wait: seconds after which a row that is in no batch yet is refused (`Overloaded`); None for never.
        watch: seconds between two looks at the folders; 0 for none.
    """

    def __init__(
        self,
        base: Base,
        adapters: Sequence[str | Path] = (),
        *,
        slots: int = 32,
        max_rank: int = 64,
        queue: int = 4096,
        wait: float | None = None,
        watch: float = 2.0,
    ) -> None:
        """Keep them; `start` makes the engine run."""
        self.base, self.tokenizer = base, base.tokenizer
        self._roots, self._slots, self._max_rank, self._seconds = adapters, slots, max_rank, watch
        self._store: Store | None = None
        self._trunk = Trunk(base)
        self._mounting = asyncio.Lock()
        self._mounts = 0
        self.limits = Limits(
            context=base.context, vocabulary=base.config.get_text_config().vocab_size, queue=queue
        )
        self._wait = wait
        self._jobs: deque[Job] = deque()
        self._taken: list[Job] = []
        self._arrived = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._running: list[Job] = []
        self._open = False
        self._steps = self._tokens = self._timeouts = 0
        self._rate = 0.02

    # as every engine

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
    def width(self) -> int:
        """Numbers of a vector."""
        return int(self.base.config.get_text_config().hidden_size)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._open and not self._tasks[0].done()

    def kind(self, name: str | None) -> str | None:
        """The head of an adapter, or of the base; None where there is none, or it was not read yet."""
        head = self.base.own
        if name is not None:
            alias = self.adapters.names.get(name)
            head = _fitted(alias.content).head if alias is not None and alias.content is not None else None
        return None if head is None else head.kind

    @property
    def stats(self) -> Stats:
        """Counts of now."""
        aliases = self._store.names.items() if self._store else ()
        return Stats(
            waiting=len(self._jobs),
            running=len(self._running),
            slots=self._slots,
            mounted=tuple(name for name, alias in aliases if alias.content and alias.content.slot),
            running_adapters=tuple({job.using.name for job in self._running if job.using.name}),
            waiting_adapters=tuple({job.using.name for job in self._jobs if job.using.name}),
            prompt_tokens_total=self._tokens,
            steps_total=self._steps,
            mounts_total=self._mounts,
            evictions_total=self._store.evictions if self._store else 0,
            timeouts_total=self._timeouts,
        )

    async def start(self) -> None:
        """Begin to serve; adapters are read one after the other meanwhile, as far as slots reach."""
        self._thread = ThreadPoolExecutor(1, "lorica-encoder")
        self._store = Store(
            lambda adapter, folder: fit(self.base, adapter, folder),
            self._roots,
            max_rank=self._max_rank,
            resident=self._slots,
            dropped=self._dropped,
        )
        if self._seconds:
            self._store.watch(self._seconds)
        self._open = True
        self._tasks = [asyncio.create_task(task()) for task in (self._work, self._read)]

    async def stop(self, *, drain: float | None = None) -> None:
        """Take no more requests, and end; those that wait have `drain` seconds. The model is as it was."""
        self._open = False
        until = time.monotonic() + (drain or 0)
        while (self._jobs or self._running) and time.monotonic() < until and not self._tasks[0].done():
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in (*self._jobs, *self._taken):
            job.fail(EngineDown("the server is shutting down"))
        if self._store is not None:
            await self._store.close()
            for content in self._store.contents.values():
                self._dropped(content)
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    async def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do something in the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    # requests

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Using]:
        """Hold an adapter, or the base (None), for a request; reads the adapter where it was not yet.

        Raises:
            UnknownAdapter: nothing has this name.
            RefusedAdapter: it cannot be served.
            EngineDown: the engine does not run.
        """
        if not self.alive:
            raise EngineDown("the engine does not run")
        if name is None:
            yield Using(self, None, self.base.own, None)
            return
        lease = self.adapters.lease(name)
        served = False
        try:
            content = await lease.ready()
            yield Using(self, name, _fitted(content).head, await self._mount(name, content))
            served = True
        finally:
            lease.release(served=served)

    async def ask(self, rows: Sequence[Row], using: Using, head: Head | None) -> list[np.ndarray]:
        """The answers to some rows; if the caller is cancelled, so are they.

        Raises:
            Overloaded: the queue has no room for all of them.
            InvalidRequest: the model fails on one of them.
            EngineDown: the engine stopped.
        """
        if not self.alive:
            raise EngineDown("the engine does not run")
        if len(self._jobs) + len(rows) > self.limits.queue:
            wait = self._rate * len(self._jobs)
            raise Overloaded(
                f"{len(self._jobs):,} rows wait, and {self.limits.queue:,} may", retry_after=wait
            )
        loop = asyncio.get_running_loop()
        jobs = [Job(row, using, head, loop.create_future()) for row in rows]
        self._jobs.extend(jobs)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(job.answer for job in jobs)))
        finally:
            for job in jobs:
                job.answer.cancel()

    # adapters on the trunk

    async def _mount(self, name: str, content: Content) -> Mount:
        """Put an adapter on the trunk, unless it is there."""
        async with self._mounting:
            if not isinstance(content.slot, Mount):
                # Whoever leaves meanwhile leaves it there: the model's thread does not stop half way.
                await asyncio.shield(asyncio.ensure_future(self._put_on(name, content)))
            assert isinstance(content.slot, Mount)
            return content.slot

    async def _put_on(self, name: str, content: Content) -> None:
        try:
            content.slot = await self._run(self._trunk.put, _fitted(content).trunk)
        except LoricaError as error:
            raise RefusedAdapter(f"{name}: {error}") from error
        self._mounts += 1

    def _dropped(self, content: Content) -> None:
        """Take an adapter off that nobody holds, once the thread comes to it."""
        mount, content.slot = content.slot, None
        if isinstance(mount, Mount) and self._thread is not None:
            self._thread.submit(self._trunk.off, mount)

    async def _read(self) -> None:
        """Read the listed adapters, as far as slots reach: no first request waits for them."""
        for entry in self.adapters.entries()[: self._slots]:
            if entry.state == "listed":
                with contextlib.suppress(LoricaError):  # its entry tells
                    lease = self.adapters.lease(entry.name)  # who asks meanwhile waits for the same reading
                    try:
                        await lease.ready()
                    finally:
                        lease.release()

    # the queue

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if len(self._jobs) < ROWS:
                await asyncio.sleep(PATIENCE)
            self._arrived.clear()
            while taken := self._take():
                self._taken = taken
                try:
                    await self._answer(taken)
                except Exception as error:
                    log.exception("%d rows could not be answered", len(taken))
                    for job in taken:
                        job.fail(EngineDown(f"the engine failed: {error}", retry_after=1.0))

    def _take(self) -> list[Job]:
        """The rows that have waited longest, up to so many tokens, but for those that nobody waits for."""
        taken: list[Job] = []
        tokens, now = 0, time.monotonic()
        while self._jobs and (not taken or tokens + len(self._jobs[0].row) <= TOKENS):
            job = self._jobs.popleft()
            if self._wait is not None and now - job.since > self._wait:
                job.fail(Overloaded(f"the text waited {self._wait:g} s for its turn", retry_after=self._wait))
                self._timeouts += 1
            elif not job.answer.done():
                taken.append(job)
                tokens += len(job.row)
        return taken

    async def _answer(self, jobs: list[Job]) -> None:
        """Answer some rows, batch by batch."""
        apart: dict[Mount | None, list[Job]] = {}
        for job in jobs:
            mount = job.using.mount
            apart.setdefault(mount if mount is not None and mount.alone else None, []).append(job)
        for group in apart.values():
            for batch in batches([len(job.row) for job in group]):
                # Each adapter's rows side by side: their products need no gathering.
                chosen = sorted((group[i] for i in batch), key=lambda job: id(job.using.mount))
                chosen = [job for job in chosen if not job.answer.done()]
                await self._compute(chosen)

    async def _compute(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        self._running, begun = jobs, time.perf_counter()
        try:
            mounts, heads = [job.using.mount for job in jobs], [job.head for job in jobs]
            found = await self._run(self._trunk.forward, [job.row for job in jobs], mounts, heads)
        except Exception as error:
            log.exception("the model failed on a batch of %d rows", len(jobs))
            if len(jobs) > 1:  # one of them is at fault, and the others are not to suffer
                for job in jobs:
                    await self._compute([job])
                return
            jobs[0].fail(InvalidRequest(f"the model fails on this text: {error}", param="input"))
        else:
            for job, output in zip(jobs, found, strict=True):
                if not np.isfinite(output).all():
                    name = job.using.name or "the base"
                    job.fail(
                        RefusedAdapter(f"{name} gives NaN or infinity for this text; its weights overflow")
                    )
                elif not job.answer.done():
                    job.answer.set_result(output)
        finally:
            self._running = []
        self._steps += 1
        self._tokens += sum(len(job.row) for job in jobs)
        self._rate = 0.9 * self._rate + 0.1 * (time.perf_counter() - begun) / len(jobs)


def _fitted(content: Content) -> Fitted:
    assert isinstance(content.fitted, Fitted)
    return content.fitted
