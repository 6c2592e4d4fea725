"""A record of loading and unloading over HTTP, so that every replica serves the same names.

    POST ──▶ one replica loads ──▶ Registry numbers the change ──▶ all replicas follow
                                       ▲ a replica that starts, and each of them every few seconds

Folders that are watched need none of this: each replica looks at them itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorica.errors import LoricaError
from lorica.serve.engine import UnknownAdapter

if TYPE_CHECKING:  # the registry's process has no use for torch
    from lorica.serve.http.served import Served

log = logging.getLogger("lorica.serve")


@dataclass(frozen=True, slots=True)
class Change:
    """The last change of a name.

    Args:
        number: grows from change to change: nanoseconds since the epoch.
        path: folder that it was loaded from, empty where the name was listed already; None: it was unloaded.
        pinned: whether it is never evicted.
    """

    number: int
    path: str | None
    pinned: bool = False


Journal = dict[str, Change]
"""The last change of each name."""


def newest(one: Mapping[str, Change], other: Mapping[str, Change]) -> Journal:
    """Two journals as one: of each name, the later change."""
    found = dict(one)
    for name, change in other.items():
        if name not in found or found[name].number < change.number:
            found[name] = change
    return found


class Registry:
    """The journal, in a process of its own; replicas teach it to one that was started again."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.journal: Journal = {}

    async def sync(self, known: Journal) -> Journal:
        """Take what a replica knows, and tell it all."""
        self.journal = newest(self.journal, known)
        return self.journal

    async def note(self, name: str, path: str | None, pinned: bool = False) -> Journal:
        """Number a change, and give the journal with it."""
        last = max((change.number for change in self.journal.values()), default=0)
        before = self.journal.get(name)
        if path == "" and before is not None:
            path = before.path or ""
        self.journal = {**self.journal, name: Change(max(time.time_ns(), last + 1), path, pinned)}
        return self.journal


class Follower:
    """Makes one replica's store do what the journal says.

    Args:
        here: what the replica serves.
    """

    def __init__(self, here: Served) -> None:
        """Begin with nothing."""
        self._here = here
        self.journal: Journal = {}

    async def follow(self, journal: Journal) -> dict[str, str]:
        """Do what is new in a journal.

        Returns:
            What could not be done, by name.
        """
        new = {
            name: change
            for name, change in journal.items()
            if name not in self.journal or self.journal[name].number < change.number
        }
        self.journal = newest(self.journal, new)
        problems = {}
        for name, change in sorted(new.items(), key=lambda each: each[1].number):
            try:
                await self._do(name, change)
            except LoricaError as error:
                log.warning("%s, which was loaded at another replica, cannot be loaded: %s", name, error)
                problems[name] = str(error)
        return problems

    async def _do(self, name: str, change: Change) -> None:
        store = self._here.adapters
        if change.path is not None:
            await store.load(name, change.path or None, pin=change.pinned, replace=True)
            return
        try:
            entry = store.entry(name)
            # What was put under the name after that is another adapter, found in a watched folder.
            written = (
                0
                if entry.path is None
                else max((part.stat().st_mtime_ns for part in entry.path.glob("adapter_*")), default=0)
            )
            if written <= change.number:
                await store.unload(name)
        except UnknownAdapter:
            pass
