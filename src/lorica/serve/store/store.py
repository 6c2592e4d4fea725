"""Names and contents of adapters.

    "support-v2" ──▶ Alias ──▶ Content (sha256) ◀── leases of requests
    "default"    ──▶ Alias ──┘

A name is an alias of a content. Whoever asks holds a lease on the content that the name had then, whatever
becomes of the name; a content that nobody holds and no name means is dropped.

Everything here is called in the event loop, but `fit`, which runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lorica.adapter import Adapter
from lorica.errors import LoricaError, listing, nearest
from lorica.serve.engine import Entry, RefusedAdapter, UnknownAdapter
from lorica.serve.store import folders
from lorica.serve.store.folders import Found

log = logging.getLogger("lorica.serve")


class Fits(Protocol):
    """An adapter made ready for an engine."""

    @property
    def rank(self) -> int:
        """The largest of its modules'."""
        ...

    @property
    def applied(self) -> int:
        """Modules that it acts on."""
        ...

    @property
    def total(self) -> int:
        """Modules that it has something for."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...


@dataclass(eq=False)
class Content:
    """An adapter's content, under any name.

    Args:
        hash: its identity.
        fitted: ready for the engine.

    Attributes:
        leases: of requests.
        used: when one was taken last, by the monotonic clock.
        slot: where the engine has it, if it does; the engine's own.
        running: requests in the engine that use the slot; the engine's own.
    """

    hash: str
    fitted: Fits
    leases: int = 0
    used: float = field(default_factory=time.monotonic)
    slot: object | None = None
    running: int = 0


@dataclass(eq=False)
class Alias:
    """A name, and its content now.

    Args:
        found: its folder.
        content: None where it was not read.
        pinned: whether it is never evicted.
        task: reads it now.
        problem: why that failed.
        served: requests that were answered.
        waiting: requests that wait for it to be read.
        loaded: when it was read, since the epoch.
    """

    found: Found
    content: Content | None = None
    pinned: bool = False
    task: asyncio.Task[Content] | None = None
    problem: str | None = None
    served: int = 0
    waiting: int = 0
    loaded: float | None = None


@dataclass(eq=False)
class Lease:
    """A request's hold on an adapter, from its admission to its last token.

    Args:
        store: that it is of.
        alias: the name's.
        content: None until it was read.
        task: that reads it.
        held: whether it was not given back yet.
    """

    store: Store
    alias: Alias
    content: Content | None = None
    task: asyncio.Task[Content] | None = None
    held: bool = True

    async def ready(self) -> Content:
        """The content, once it was read.

        Raises:
            RefusedAdapter: it cannot be served, and the lease is given back.
        """
        if self.content is None:
            assert self.task is not None
            try:
                content = await asyncio.shield(self.task)
            except LoricaError:
                self.release()
                raise
            if not self.held:
                raise RefusedAdapter("the adapter was given back before it was read")
            self.alias.waiting -= 1
            self.content = content
            content.leases += 1
        return self.content

    def release(self, *, served: bool = False) -> None:
        """Give it back; once is enough.

        Args:
            served: whether the request was answered.
        """
        if not self.held:
            return
        self.held = False
        self.alias.served += served
        if self.content is None:
            self.alias.waiting -= 1
        else:
            self.content.leases -= 1
            self.content.used = time.monotonic()
            self.store.tidy(self.content)


class Store:
    """The adapters of one engine.

    Args:
        fit: makes an adapter, from its folder, ready for the engine, in a thread; raises what is the matter
            with it.
        roots: folders that adapters are listed in, and may be loaded from.
        max_rank: larger ranks are refused.
        resident: contents that are kept in memory, but for those that are held or pinned.
        max_bytes: larger files are refused.
        loads: files that are read together.
        dropped: told of a content that leaves memory.
    """

    def __init__(
        self,
        fit: Callable[[Adapter, Path], Fits],
        roots: Iterable[str | Path] = (),
        *,
        max_rank: int = 64,
        resident: int = 256,
        max_bytes: int = 4 << 30,
        loads: int = 2,
        dropped: Callable[[Content], None] = lambda content: None,
    ) -> None:
        self.fit, self.roots = fit, tuple(Path(root) for root in roots)
        self.max_rank, self.resident, self.max_bytes = max_rank, resident, max_bytes
        self.names: dict[str, Alias] = {}
        self.contents: dict[str, Content] = {}
        self.evictions = 0
        self._seen: dict[str, folders.Signature] = {}
        self._hidden: dict[str, folders.Signature] = {}
        self._asked: set[str] = set()
        self._dropped = dropped
        self._loads = asyncio.Semaphore(loads)
        self._watch: asyncio.Task[None] | None = None
        for root in self.roots:
            if not root.is_dir():
                raise RefusedAdapter(f"{root} is no folder; name one that holds adapters")
        self._merge(folders.scan(self.roots))

    def entries(self) -> list[Entry]:
        """Every adapter, by name."""
        return [self._entry(name, alias) for name, alias in sorted(self.names.items())]

    def entry(self, name: str) -> Entry:
        """One of them.

        Raises:
            UnknownAdapter: nothing has this name.
        """
        return self._entry(name, self._alias(name))

    @property
    def leases(self) -> int:
        """Of all requests."""
        return sum(c.leases for c in self.contents.values()) + sum(a.waiting for a in self.names.values())

    def lease(self, name: str) -> Lease:
        """Take an adapter for a request; it is read if it has to be.

        Raises:
            UnknownAdapter: nothing has this name.
            RefusedAdapter: it cannot be served.
        """
        alias = self._alias(name)
        if alias.content is not None:
            alias.content.leases += 1
            alias.content.used = time.monotonic()
            return Lease(self, alias, alias.content)
        if alias.problem is not None:
            raise RefusedAdapter(alias.problem)
        alias.waiting += 1
        return Lease(self, alias, task=alias.task or self._start_reading(alias, alias.found))

    def _start_reading(self, alias: Alias, found: Found) -> asyncio.Task[Content]:
        async def read() -> Content:
            content = await self._read(alias, found)
            self.tidy()
            return content

        task = alias.task = asyncio.create_task(read())
        # Whoever waits learns of a failure; where nobody does, it stands in the entry.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    async def load(
        self, name: str, path: str | Path | None = None, *, pin: bool = False, replace: bool = False
    ) -> Entry:
        """Read an adapter into memory, away from the event loop.

        Args:
            name: to serve it under.
            path: its folder, within one of the roots; None for one that is listed.
            pin: never evict it.
            replace: whether the name may be taken by what is in memory already. Its requests finish on that.

        Raises:
            RefusedAdapter: it cannot be served; or the name is taken, or cannot be one.
            UnknownAdapter: there is no such folder, or none of that name is listed.
        """
        folders.check_name(name)
        before = self.names.get(name)
        if path is None:
            path = self._alias(name).found.path
        elif before is not None and before.content is not None and not replace:
            raise RefusedAdapter(f"{name!r} is loaded already; give another name, or ask to replace it")
        if name in self._asked:
            raise RefusedAdapter(f"{name!r} is being loaded already; ask again once it is")
        real = folders.within(path, self.roots)
        self._asked.add(name)
        try:
            found = await asyncio.to_thread(folders.look, name, real, self.roots)
            alias = self.names.get(name) or Alias(found)
            if alias.task is not None:  # what is asked for now comes after it
                await asyncio.wait((alias.task,))
            content = await self._read(alias, found)
        finally:
            self._asked.discard(name)
        self.names[name] = alias
        alias.pinned = alias.pinned or pin
        self.tidy()
        log.info("loaded %s: %s", name, content.hash[:12])
        return self.entry(name)

    async def unload(self, name: str) -> None:
        """Stop serving a name; who holds the adapter finishes, then its memory is freed.

        Raises:
            UnknownAdapter: nothing has this name.
        """
        self._alias(name)
        alias = self.names.pop(name)
        self._hidden[name] = self._seen.get(name, alias.found.signature)
        if alias.task is not None:
            with contextlib.suppress(LoricaError):
                await alias.task
        self.tidy()

    def watch(self, seconds: float) -> None:
        """Look at the folders every so many seconds: new ones are listed, changed ones read."""
        self._watch = asyncio.create_task(self._look(seconds))

    async def close(self) -> None:
        """Stop watching, and wait for adapters that are being read."""
        tasks = [alias.task for alias in self.names.values() if alias.task is not None]
        if self._watch is not None:
            self._watch.cancel()
            tasks.append(self._watch)  # type: ignore[arg-type]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watch = None

    def tidy(self, given: Content | None = None) -> None:
        """Drop contents that no name means and nobody holds, and the least used of too many.

        Args:
            given: was given back; its name may have been unloaded before it was read.
        """
        if given is not None and not given.leases and self.contents.get(given.hash) is not given:
            self._dropped(given)
        meant = {id(alias.content): alias for alias in self.names.values() if alias.content is not None}
        pinned = {id(alias.content) for alias in self.names.values() if alias.pinned or alias.waiting}
        idle = [content for content in self.contents.values() if not content.leases]
        for content in idle:
            if id(content) not in meant:
                self._drop(content)
        free = [c for c in idle if id(c) in meant and id(c) not in pinned]
        for content in sorted(free, key=lambda c: (c.slot is not None, c.used)):
            if len(self.contents) <= self.resident:
                return
            self._drop(content)
            self.evictions += 1

    def _drop(self, content: Content) -> None:
        del self.contents[content.hash]
        for alias in self.names.values():
            if alias.content is content:
                alias.content = None
        self._dropped(content)

    async def _read(self, alias: Alias, found: Found) -> Content:
        try:
            async with self._loads:
                content, found = await asyncio.to_thread(self._content, found)
        except RefusedAdapter as error:
            if alias.content is None:
                alias.problem, alias.found = str(error), found
            raise
        finally:
            alias.task = None
        content = self.contents.setdefault(content.hash, content)
        content.used = time.monotonic()
        alias.content, alias.found, alias.problem, alias.loaded = content, found, None, time.time()
        return content

    def _content(self, found: Found) -> tuple[Content, Found]:
        found, adapter, identity = self._settled(found)
        known = self.contents.get(identity)
        if known is not None:
            return known, found
        try:
            return Content(identity, self.fit(adapter, found.path)), found
        except LoricaError as error:
            raise RefusedAdapter(f"{found.name}: {error}") from error
        except Exception as error:  # of files that strangers wrote, which may hold anything
            log.exception("%s could not be fitted", found.name)
            raise RefusedAdapter(f"{found.name}: {type(error).__name__}: {error}") from error

    def _settled(self, found: Found) -> tuple[Found, Adapter, str]:
        """Read a folder; one that changed since it was listed, or changes meanwhile, is looked at again."""
        for wait in (0.1, 0.4, None):
            if folders.changed(found):
                found = folders.look(found.name, found.path, self.roots)
            try:
                return found, *folders.read(found, max_rank=self.max_rank, max_bytes=self.max_bytes)
            except RefusedAdapter:
                if wait is None or not folders.changed(found):
                    raise
                time.sleep(wait)
        raise AssertionError

    def _alias(self, name: str) -> Alias:
        if name not in self.names:
            have = listing(sorted(self.names), limit=8)
            raise UnknownAdapter(
                f"no adapter is served as {name[:128]!r}{nearest(name[:128], self.names)}"
                + (f"; there are: {have}" if have else "; there are none")
            )
        return self.names[name]

    def _entry(self, name: str, alias: Alias) -> Entry:
        content, found = alias.content, alias.found
        state = "listed" if alias.problem is None else "refused"
        if content is not None:
            state = "resident" if content.slot is None else "mounted"
        elif alias.task is not None:
            state = "loading"
        return Entry(
            name=name,
            state=state,
            path=found.path,
            hash=None if content is None else content.hash,
            rank=found.rank if content is None else content.fitted.rank,
            applied=None if content is None else content.fitted.applied,
            total=None if content is None else content.fitted.total,
            size=found.size,
            pinned=alias.pinned,
            requests=alias.waiting + (0 if content is None else content.leases),
            served=alias.served,
            loaded=alias.loaded,
            problem=alias.problem,
            template=found.template,
        )

    async def _look(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                known = {name: alias.found for name, alias in self.names.items()}
                self._merge(await asyncio.to_thread(folders.scan, self.roots, known))
            except Exception:  # of one look at folders that others write to
                log.exception("the folders of adapters could not be looked at")

    def _merge(self, found: dict[str, Found]) -> None:
        """Take note of the folders' adapters now.

        A name goes by its folder again only once that changed: until then, what was asked for holds.
        """
        for name, own in found.items():
            alias, before = self.names.get(name), self._seen.get(name)
            if alias is not None and (alias.task is not None or name in self._asked):
                continue  # looked at again when that was read
            self._seen[name] = own.signature
            if alias is None:
                if self._hidden.get(name) != own.signature:  # unloaded, and as it was then
                    self.names[name] = Alias(own, problem=own.problem)
            elif own.signature not in (before, alias.found.signature):
                if alias.content is None:
                    alias.found, alias.problem = own, own.problem
                elif own.problem is None:  # requests go on with what there is until the new one was read
                    self._start_reading(alias, own)
        self._seen = {name: own for name, own in self._seen.items() if name in found}
        for name, alias in list(self.names.items()):
            busy = alias.task is not None or alias.waiting
            if name not in found and not busy and not alias.found.path.exists():
                del self.names[name]
        self.tidy()
