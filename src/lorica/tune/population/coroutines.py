"""Several trainings in one thread, each a coroutine, which wait for one another where they can share work.

    trial 1   data ─▶ step ┊─▶ layer ┊─▶ layer ┊ … ─▶ backward ┊─▶ optimizer, validation, checkpoint ─▶ step ┊
    trial 2   data ─▶ step ┊─▶ layer ┊─▶ layer ┊ … ─▶ backward ┊─▶ optimizer ─▶ step                        ┊
                           ┊         ┊ one product over both trials' rows      ┊

A coroutine runs the training loop as it is, with its own model, optimizer, callbacks and files. It yields
only where it calls `Coroutine.synchronize`. Between two such calls it has the process's random numbers and
autocast to itself and finds them as it left them, so it draws and rounds as it would alone.
"""

from __future__ import annotations

import contextvars
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy
import torch
from accelerate.state import GradientState
from torch import Tensor

from lorica.errors import require

T = TypeVar("T")


class SyncPoint(NamedTuple):
    """A point at which coroutines can share work.

    Args:
        order: its position in the step. Coroutines that are ahead wait for those behind.
        key: equal for coroutines whose requests can be served together.
        serve: takes one request per coroutine, returns one answer per coroutine.
    """

    order: float
    key: Hashable
    serve: Callable[[Sequence[Any]], Sequence[Any]]


class Coroutine(Generic[T]):
    """One training among several.

    Args:
        name: of the trial.
        work: the training; called with its coroutine.

    Attributes:
        done: whether it has ended.
        result: what `work` returned.
        error: the error that it raised instead.
    """

    def __init__(self, name: str, work: Callable[[Coroutine[T]], T]) -> None:
        """Start nothing yet."""
        greenlet = require("greenlet", extra="tune")
        self.name = name
        self.done = False
        self.result: T | None = None
        self.error: Exception | None = None
        self._work = work
        self._routine = greenlet.greenlet(self._run)
        self._routine.gr_context = contextvars.copy_context()
        self._waiting: tuple[SyncPoint, Any] | None = None

    def synchronize(self, point: SyncPoint, request: Any) -> Any:
        """Wait for the others at a point; returns the answer. Call it from inside the coroutine."""
        return self._routine.parent.switch((point, request))

    def begin_step(self) -> None:
        """Wait until all coroutines begin a step. Call it from inside the coroutine."""
        self.synchronize(_START, None)

    def _run(self, _: Any) -> None:
        try:
            self.result = self._work(self)
        except Exception as error:
            self.error = error
        self.done = True

    def _resume(self, answer: Any) -> None:
        self._waiting = self._routine.switch(answer)

    def _abandon(self) -> None:
        """End it by an exception, so that it closes its files."""
        if not self.done and self._routine:
            self._routine.throw()
        self.done = True


_START = SyncPoint(-1, "start", lambda requests: requests)


class CoroutineGroup:
    """Runs coroutines side by side. A context manager: at its end it ends the coroutines that still run."""

    def __init__(self) -> None:
        """No coroutine yet."""
        self.coroutines: list[Coroutine[Any]] = []
        self._torch = _OwnState(_torch_state, _set_torch_state)
        self._rest = _OwnState(_other_state, _set_other_state)

    def __enter__(self) -> CoroutineGroup:
        """Nothing more to do."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the coroutines that still run, and give the process its random numbers back."""
        for coroutine in self.coroutines:
            self._switch_state(coroutine, whole=True)
            coroutine._abandon()
        self.coroutines.clear()
        self._switch_state(None, whole=True)

    def add(self, coroutine: Coroutine[Any]) -> None:
        """Add a coroutine; it starts with the next `advance`."""
        self.coroutines.append(coroutine)

    def advance(self) -> list[Coroutine[Any]]:
        """Take all coroutines to their next step, and through that step together.

        Returns:
            The coroutines that ended; the group no longer holds them.
        """
        for coroutine in self.coroutines:
            if coroutine._waiting is None:
                self._resume(coroutine, None)
        cohort = [coroutine for coroutine in self.coroutines if not coroutine.done]
        for coroutine in cohort:
            self._resume(coroutine, None)
        while groups := list(_serve_first(cohort)):
            for coroutine, answer in groups:
                self._resume(coroutine, answer)
        ended = [coroutine for coroutine in self.coroutines if coroutine.done]
        self.coroutines = [coroutine for coroutine in self.coroutines if not coroutine.done]
        self._switch_state(None, whole=True)
        return ended

    def _resume(self, coroutine: Coroutine[Any], answer: Any) -> None:
        in_forward = coroutine._waiting is not None and 0 <= coroutine._waiting[0].order < BACKWARD.order
        self._switch_state(coroutine, whole=not in_forward)
        coroutine._resume(answer)

    def _switch_state(self, coroutine: Coroutine[Any] | None, *, whole: bool) -> None:
        """Restore the state of a coroutine, or of the caller (None).

        Between the layers of a forward pass only torch's state is exchanged: numpy's takes a hundred times as
        long, and models draw from torch.
        """
        self._torch.switch_to(coroutine)
        if whole:
            self._rest.switch_to(coroutine)


def _backward(losses: Sequence[Tensor]) -> list[None]:
    torch.autograd.backward(list(losses))
    return [None] * len(losses)


BACKWARD = SyncPoint(float("inf"), "backward", _backward)
"""Here all losses wait for one another: one backward pass goes through all graphs."""


def _serve_first(cohort: Sequence[Coroutine[Any]]) -> Iterator[tuple[Coroutine[Any], Any]]:
    """Serve the coroutines at the earliest point; yields each with its answer."""
    waiting = [
        (coroutine, *coroutine._waiting)
        for coroutine in cohort
        if coroutine._waiting and coroutine._waiting[0] != _START
    ]
    if not waiting:
        return
    first = min((point for _, point, _ in waiting), key=lambda point: point.order)
    there = [(coroutine, request) for coroutine, point, request in waiting if point.key == first.key]
    answers = first.serve([request for _, request in there])
    yield from zip((coroutine for coroutine, _ in there), answers, strict=True)


class _OwnState:
    """A state of the process, of which each coroutine, and the caller (None), has its own version."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._read, self._write = read, write
        self._holder: Coroutine[Any] | None = None
        self._kept: dict[Coroutine[Any] | None, Any] = {}

    def switch_to(self, coroutine: Coroutine[Any] | None) -> None:
        if coroutine is self._holder:
            return
        if self._holder is None or not self._holder.done:
            self._kept[self._holder] = self._read()
        if coroutine in self._kept:
            self._write(self._kept.pop(coroutine))
        elif self._holder is not None:  # a new one starts from the caller's
            self._write(self._kept[None])
        self._holder = coroutine


class _TorchState(NamedTuple):
    """torch's random numbers, and its autocast per device: whether it is on, and its dtype."""

    cpu: Tensor
    cuda: list[Tensor]
    autocast: list[tuple[str, bool, torch.dtype]]


def _torch_state() -> _TorchState:
    there = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = ("cpu", "cuda") if there else ("cpu",)
    autocast = [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices
    ]
    return _TorchState(torch.get_rng_state(), torch.cuda.get_rng_state_all() if there else [], autocast)


def _set_torch_state(state: _TorchState) -> None:
    torch.set_rng_state(state.cpu)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)
    for device, enabled, dtype in state.autocast:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _other_state() -> tuple[Any, ...]:
    """Python's and numpy's random numbers, and accelerate's position in loaders and accumulation."""
    return random.getstate(), numpy.random.get_state(), dict(GradientState._shared_state)


def _set_other_state(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    # The instances share this very dictionary.
    GradientState._shared_state.clear()
    GradientState._shared_state.update(states[2])
