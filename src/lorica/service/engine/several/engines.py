"""Several engines over one base: each a thread, and a process that does its passes.

run 1 ┊ run 2 ┊ run 3 ┊ run 4        a run that has nothing to do goes, with its next call,
  │       │       │       │          to the engine that has the fewest
  └─ engine 1 ─┘ └─ engine 2 ─┘
             one base

What a run gets does not depend on its company, and so neither on its engine. Where processes cannot be had
(`can_fork`) each thread does its passes itself, on modules of its own around the same parameters.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from lorica.errors import ConfigError
from lorica.service.engine.base import Base
from lorica.service.engine.drawing import Samples
from lorica.service.engine.engine import Engine, Output
from lorica.service.engine.proof import prove
from lorica.service.engine.several.memory import can_fork, has_room
from lorica.service.engine.several.process import Process
from lorica.service.errors import ServiceDown

MOST = 2
"""Engines where nobody says how many: more were not measured, and they share Python's lock."""


def usual(device: torch.device) -> int:
    """The default number of engines: `MOST`, as torch's threads allow; off the CPU one."""
    return min(MOST, torch.get_num_threads()) if device.type == "cpu" else 1


class Engines:
    """Engines that look like one; the verbs are `Engine`'s, with its arguments.

    Args:
        base: the model.
        count: how many. From 2 on torch's threads are divided among them, in the whole process, until `stop`.
        tokens: as of `Engine`.
        lanes: as of `Engine`; each engine's.

    Raises:
        ConfigError: the count is none.
    """

    def __init__(self, base: Base, count: int = 1, *, tokens: int = 2048, lanes: int = 128) -> None:
        """Start them."""
        if count < 1:
            raise ConfigError(f"there must be at least 1 engine, not {count}")
        self._threads = torch.get_num_threads()
        if count > 1:
            torch.set_num_threads(max(1, self._threads // count))
        prove(base)
        # Nobody runs the base's own modules: whoever makes an adapter copies them, at any time.
        bases = [Base.sharing(base.model, base.name, base.tokenizer) for _ in range(count)]
        served: dict[str, int] = {}
        processes: list[Process | None] = [None] * count
        if count > 1 and can_fork() and base.device.type == "cpu" and has_room():
            threads = torch.get_num_threads()
            for each in bases:
                prove(each)
            processes = [Process(each, lanes=lanes, threads=threads) for each in bases]
        self._engines = [
            Engine(each, tokens=tokens, lanes=lanes, served=served, process=process)
            for each, process in zip(bases, processes, strict=True)
        ]
        self._lock = threading.Lock()
        self._places: dict[str, int] = {}
        self._pending: Counter[str] = Counter()
        self._runs, self._requests = ([0] * count for _ in range(2))

    @property
    def alive(self) -> bool:
        """Whether all of them take calls."""
        return all(engine.alive for engine in self._engines)

    @property
    def passes(self) -> int:
        """Passes so far."""
        return sum(engine.passes for engine in self._engines)

    def learn(self, run: str, *data: Any, **more: Any) -> Future[Output]:
        """As `Engine.learn`."""
        return self._placed(run, lambda engine: engine.learn(run, *data, **more))

    def call(self, run: str, *work: Any, **more: Any) -> Future[Any]:
        """As `Engine.call`."""
        return self._placed(run, lambda engine: engine.call(run, *work, **more))

    def sample(self, *what: Any, **more: Any) -> Future[Samples]:
        """As `Engine.sample`."""
        self._check()
        with self._lock:
            at = self._requests.index(min(self._requests))
            self._requests[at] += 1
        try:
            future = self._engines[at].sample(*what, **more)
        except Exception:
            self._drawn(at)
            raise
        future.add_done_callback(lambda _: self._drawn(at))
        return future

    def cancel(self, drawing: Future[Samples]) -> None:
        """As `Engine.cancel`."""
        for engine in self._engines:
            engine.cancel(drawing)

    def stop(self) -> None:
        """As `Engine.stop`."""
        for engine in self._engines:
            engine.stop()
        if len(self._engines) > 1:
            torch.set_num_threads(self._threads)

    def _check(self) -> None:
        if not self.alive:
            raise ServiceDown("an engine has stopped")

    def _placed(self, run: str, give: Callable[[Engine], Future[Any]]) -> Future[Any]:
        """Give a call to the engine that has the run's earlier ones, or to the one with the fewest runs."""
        self._check()
        with self._lock:
            if not self._pending[run]:
                self._places[run] = at = self._runs.index(min(self._runs))
                self._runs[at] += 1
            self._pending[run] += 1
            at = self._places[run]
        try:
            future = give(self._engines[at])
        except Exception:
            self._over(run)
            raise
        future.add_done_callback(partial(self._over, run))
        return future

    def _over(self, run: str, future: Future[Any] | None = None) -> None:
        if future is not None and future.cancelled():
            return  # the engine may have begun it all the same, so that the run stays there
        with self._lock:
            self._pending[run] -= 1
            if not self._pending[run]:
                del self._pending[run]
                self._runs[self._places.pop(run)] -= 1

    def _drawn(self, at: int) -> None:
        with self._lock:
            self._requests[at] -= 1
