"""Several trainings in one thread, which meet where they can work together.

    lane 1   data ─▶ step ┊─▶ layer ┊─▶ layer ┊ … ─▶ backward ┊─▶ optimizer, validation, checkpoint ─▶ step ┊
    lane 2   data ─▶ step ┊─▶ layer ┊─▶ layer ┊ … ─▶ backward ┊─▶ optimizer ─▶ step                        ┊
                          ┊         ┊ one product over both lanes' rows      ┊

A lane is a coroutine: the training loop as it is, with its own model, optimizer, callbacks and files. It
gives way only where it calls `Lane.meet`. Between two meetings it has the process's random numbers and
autocast to itself, and finds them as it left them; so what it draws and rounds is what it would alone.
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


class Place(NamedTuple):
    """Where lanes can meet.

    Args:
        order: how far into the step it is. Lanes ahead wait for those behind.
        key: equal for lanes whose work can be done at once.
        serve: does it: a request of each lane → an answer for each.
    """

    order: float
    key: Hashable
    serve: Callable[[Sequence[Any]], Sequence[Any]]


class Lane(Generic[T]):
    """One training among several.

    Args:
        name: of the trial.
        work: the training; told its lane.

    Attributes:
        done: whether it has ended.
        result: what `work` returned.
        error: what it raised instead.
    """

    def __init__(self, name: str, work: Callable[[Lane[T]], T]) -> None:
        """Start nothing yet."""
        greenlet = require("greenlet", extra="tune")
        self.name = name
        self.done = False
        self.result: T | None = None
        self.error: Exception | None = None
        self._work = work
        self._routine = greenlet.greenlet(self._run)
        self._routine.gr_context = contextvars.copy_context()
        self._waiting: tuple[Place, Any] | None = None

    def meet(self, place: Place, request: Any) -> Any:
        """Wait for the others at a place, and take the answer. Called from inside the lane."""
        return self._routine.parent.switch((place, request))

    def begin_step(self) -> None:
        """Wait until all lanes begin a step. Called from inside the lane."""
        self.meet(_START, None)

    def _run(self, _: Any) -> None:
        try:
            self.result = self._work(self)
        except Exception as error:
            self.error = error
        self.done = True

    def _resume(self, answer: Any) -> None:
        self._waiting = self._routine.switch(answer)

    def _abandon(self) -> None:
        """End it where it stands, by an exception that closes what it has open."""
        if not self.done and self._routine:
            self._routine.throw()
        self.done = True


_START = Place(-1, "start", lambda requests: requests)


class Lockstep:
    """Runs lanes side by side. As a context manager, abandons on exit those that have not ended."""

    def __init__(self) -> None:
        """No lane yet."""
        self.lanes: list[Lane[Any]] = []
        self._torch = _Lent(_torch_state, _set_torch_state)
        self._rest = _Lent(_other_state, _set_other_state)

    def __enter__(self) -> Lockstep:
        """Nothing more to do."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the lanes that are left, and give the process its random numbers back."""
        for lane in self.lanes:
            self._lend(lane, whole=True)
            lane._abandon()
        self.lanes.clear()
        self._lend(None, whole=True)

    def add(self, lane: Lane[Any]) -> None:
        """Take a lane in; it starts with the next `advance`."""
        self.lanes.append(lane)

    def advance(self) -> list[Lane[Any]]:
        """Take every lane to its next step, and all of them through that step together.

        Returns:
            Lanes that ended; they are out.
        """
        for lane in self.lanes:
            if lane._waiting is None:
                self._resume(lane, None)
        cohort = [lane for lane in self.lanes if not lane.done]
        for lane in cohort:
            self._resume(lane, None)
        while groups := list(_meeting(cohort)):
            for lane, answer in groups:
                self._resume(lane, answer)
        ended = [lane for lane in self.lanes if lane.done]
        self.lanes = [lane for lane in self.lanes if not lane.done]
        self._lend(None, whole=True)
        return ended

    def _resume(self, lane: Lane[Any], answer: Any) -> None:
        in_forward = lane._waiting is not None and 0 <= lane._waiting[0].order < LAST.order
        self._lend(lane, whole=not in_forward)
        lane._resume(answer)

    def _lend(self, lane: Lane[Any] | None, *, whole: bool) -> None:
        """Let a lane, or the caller, find its own state.

        Between the layers of a forward pass torch's alone is exchanged: numpy's takes a hundred times as
        long, and models draw from torch.
        """
        self._torch.lend(lane)
        if whole:
            self._rest.lend(lane)


def _backward(losses: Sequence[Tensor]) -> list[None]:
    torch.autograd.backward(list(losses))
    return [None] * len(losses)


LAST = Place(float("inf"), "backward", _backward)
"""Where the losses meet, for one backward pass through all graphs at once."""


def _meeting(cohort: Sequence[Lane[Any]]) -> Iterator[tuple[Lane[Any], Any]]:
    """Serve those who stand at the earliest place, and yield them with their answers."""
    waiting = [(lane, *lane._waiting) for lane in cohort if lane._waiting and lane._waiting[0] != _START]
    if not waiting:
        return
    first = min((place for _, place, _ in waiting), key=lambda place: place.order)
    there = [(lane, request) for lane, place, request in waiting if place.key == first.key]
    answers = first.serve([request for _, request in there])
    yield from zip((lane for lane, _ in there), answers, strict=True)


class _Lent:
    """State of the process that each lane, and the caller (None), has a version of."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._read, self._write = read, write
        self._holder: Lane[Any] | None = None
        self._kept: dict[Lane[Any] | None, Any] = {}

    def lend(self, lane: Lane[Any] | None) -> None:
        if lane is self._holder:
            return
        if self._holder is None or not self._holder.done:
            self._kept[self._holder] = self._read()
        if lane in self._kept:
            self._write(self._kept.pop(lane))
        elif self._holder is not None:  # a new one starts from the caller's
            self._write(self._kept[None])
        self._holder = lane


class _TorchState(NamedTuple):
    """torch's random numbers, and the autocast that a lane stands in: device, whether it is on, its dtype."""

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
    """Python's and numpy's random numbers, and where accelerate is in its loaders and accumulation."""
    return random.getstate(), numpy.random.get_state(), dict(GradientState._shared_state)


def _set_other_state(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    # The instances share this very dictionary.
    GradientState._shared_state.clear()
    GradientState._shared_state.update(states[2])
