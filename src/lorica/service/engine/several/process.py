"""A process that does an engine's passes: a fork, whose base is the parent's own memory.

the engine's thread ── sequences, requests; which adapters, and where they lie ─▶  the process: passes
queue, steps, files ◀──────── log-probabilities, losses, samples ────────────────  gradients: in place

Two threads would take turns at Python's lock, once per operation.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorica.service.engine.base import Base
from lorica.service.engine.datum import Datum
from lorica.service.engine.desk import Desk
from lorica.service.engine.drawing import Draw, Request, Samples
from lorica.service.engine.losses import LOSSES
from lorica.service.engine.several.memory import arena
from lorica.service.engine.training import Task, learn
from lorica.service.engine.weights import Layout, Learner, Mirror, Weights
from lorica.service.errors import ServiceDown, UserError


class _Adapter(NamedTuple):
    """An adapter that the process has not seen yet."""

    number: int
    layout: Layout
    size: int
    flat: int
    gradient: int | None


@dataclass
class _Message:
    """An order to the process.

    Args:
        tasks: sequences to learn from: tokens, inputs, name of the loss, its settings, number of the adapter.
        backward: whether gradients are wanted; None where this is no pass of learning.
        requests: for samples, that begin: number, prompt, settings, tenant, number of the adapter.
        cancelled: numbers of those that were given up.
        served: tenant → tokens so far.
        adapters: those that it has not seen.
        dropped: numbers of those that are gone.
    """

    tasks: list[tuple[Any, dict[str, Any], str, dict[str, float], int]] = field(default_factory=list)
    backward: bool | None = None
    requests: list[tuple[int, list[int], Draw, str, int | None]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    adapters: list[_Adapter] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


class Process:
    """The process of one engine, as its thread has it.

    Args:
        base: the model, proven; nobody else runs it in this process.
        lanes: samples that are written at once.
        threads: of torch, in it.
    """

    def __init__(self, base: Base, *, lanes: int, threads: int) -> None:
        """Fork; engines of this process may not have begun."""
        arena()
        self._pipe, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads; what these may hold, the process does not touch.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                _serve(base, lanes, threads, theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._status: int | None = None
        self._numbers = itertools.count()
        self._known: weakref.WeakKeyDictionary[Weights, int] = weakref.WeakKeyDictionary()
        self._dropped: list[int] = []

    def learn(self, tasks: Sequence[Task], *, backward: bool) -> None:
        """As `training.learn`.

        Raises:
            ServiceDown: the process has ended.
        """
        message = _Message(backward=backward)
        for task in tasks:
            inputs = {name: value.numpy() for name, value in task.datum.inputs.items()}
            name = next(name for name, loss in LOSSES.items() if loss is task.loss)
            number = self._number(task.weights, message)
            message.tasks.append((task.datum.tokens.numpy(), inputs, name, task.settings, number))  # type: ignore[arg-type]
        for task, (logprobs, loss_sum, error) in zip(tasks, self.ask(message), strict=True):
            task.loss_sum, task.error = loss_sum, error
            if logprobs is not None:
                task.logprobs = torch.from_numpy(logprobs)

    def desk(self, served: dict[str, int]) -> _Desk:
        """Its desk; `served` as of `Desk`."""
        return _Desk(self, served)

    def begin(self, request: Request, message: _Message) -> int:
        """Have a request be part of a message; returns its number."""
        number = next(self._numbers)
        draw = replace(request.draw, seed=request.seed)
        adapter = self._number(request.weights, message)
        message.requests.append((number, request.prompt, draw, request.tenant, adapter))
        return number

    def ask(self, message: _Message) -> Any:
        """Send a message; returns the answer.

        Raises:
            ServiceDown: the process has ended.
            Exception: of the process's work.
        """
        message.dropped, self._dropped[:] = list(self._dropped), []
        try:
            self._pipe.send_bytes(pickle.dumps(message))
            answer, error = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._ended(5)
            raise ServiceDown(
                f"the engine's process has ended (status {self._status}); start again"
            ) from None
        if error is not None:
            raise error
        return answer

    def end(self) -> None:
        """Have it end, and wait for that."""
        self._pipe.close()
        if not self._ended(10):
            os.kill(self.pid, signal.SIGKILL)
            self._ended(10)

    def _ended(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        until = time.monotonic() + seconds
        while self._status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                pid, status = self.pid, 0
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                return False
            else:
                time.sleep(0.005)
        return True

    def _number(self, weights: Weights | None, message: _Message) -> int | None:
        if weights is None:
            return None
        number = self._known.get(weights)
        if number is None:
            number = self._known[weights] = next(self._numbers)
            weakref.finalize(weights, self._dropped.append, number).atexit = False
            gradient = arena().place(weights.gradient) if isinstance(weights, Learner) else None
            place = arena().place(weights.flat)
            message.adapters.append(_Adapter(number, weights.layout, len(weights.flat), place, gradient))
        return number


class _Desk:
    """`Desk`, of a process."""

    def __init__(self, process: Process, served: dict[str, int]) -> None:
        self._process, self._served = process, served
        self._new: list[Request] = []
        self._open: dict[int, Request] = {}
        self._cancelled: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self._new or self._open)

    def add(self, request: Request) -> None:
        if request.takes_turn():
            self._new.append(request)

    def advance(self) -> None:
        message = _Message(cancelled=self._cancelled)
        new, self._new, self._cancelled = self._new, [], []
        self._open.update((self._process.begin(request, message), request) for request in new)
        tenants = {request.tenant for request in self._open.values()}
        message.served = {tenant: self._served.get(tenant, 0) for tenant in tenants}
        finished, paid = self._process.ask(message)
        for tenant, tokens in paid.items():
            self._served[tenant] = self._served.get(tenant, 0) + tokens
        for number, samples, error in finished:
            request = self._open.pop(number)
            if error is not None:
                request.future.set_exception(error)
            else:
                request.future.set_result(samples)

    def cancel(self, future: Future[Samples]) -> None:
        for number, request in list(self._open.items()):
            if request.future is future:
                self._cancelled.append(number)
                del self._open[number]
                future.set_exception(UserError("cancelled by the client"))
        for request in [request for request in self._new if request.future is future]:
            self._new.remove(request)
            future.set_exception(UserError("cancelled by the client"))

    def end(self) -> Iterator[Request]:
        yield from (*self._new, *self._open.values())


def _serve(base: Base, lanes: int, threads: int, pipe: Connection) -> None:
    """The process: until the parent closes the pipe, or is gone."""
    gc.freeze()  # what is the parent's: walking it would copy its memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for entry in list(Path("/proc/self/fd").iterdir()):  # ports and locks are free when the parent is gone
        if (number := int(entry.name)) > 2 and number != pipe.fileno():
            with contextlib.suppress(OSError):
                os.close(number)
    # The threads that torch had in the parent are not here; a thread of its own gets new ones.
    thread = threading.Thread(target=_answer, args=(base, lanes, threads, pipe))
    thread.start()
    thread.join()


def _answer(base: Base, lanes: int, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    parent, here = os.getppid(), _Here(base, lanes)
    while True:
        while not pipe.poll(1.0):
            if os.getppid() != parent:  # killed, while others hold the pipe
                return
        try:
            message = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            answer: Any = here.do(message), None
        except Exception as error:
            answer = None, sendable(error)
        try:
            pipe.send_bytes(pickle.dumps(answer))
        except OSError:
            return


class _Here:
    """The adapters and gradients of the process."""

    def __init__(self, base: Base, lanes: int) -> None:
        self._base, self._served = base, dict[str, int]()
        self._desk = Desk(base, self._served, lanes)
        self._adapters: dict[int, Weights] = {}
        self._open: dict[int, Request] = {}

    def do(self, message: _Message) -> Any:
        for number in message.dropped:
            self._adapters.pop(number, None)
        for each in message.adapters:
            gradient = None if each.gradient is None else arena().at(each.gradient, each.size)
            flat = arena().at(each.flat, each.size)
            self._adapters[each.number] = Mirror(flat, gradient, each.layout)
        return self._write(message) if message.backward is None else self._learn(message)

    def _learn(self, message: _Message) -> Any:
        tasks = []
        for tokens, given, loss, settings, adapter in message.tasks:
            inputs = {name: torch.from_numpy(value) for name, value in given.items()}
            datum = Datum(torch.from_numpy(tokens), inputs)
            tasks.append(Task(datum, LOSSES[loss], settings, self._adapters[adapter]))
        learn(self._base, tasks, backward=message.backward is True)
        return [
            (None, 0.0, sendable(task.error))
            if task.error is not None
            else (task.logprobs.numpy(), task.loss_sum, None)
            for task in tasks
        ]

    def _write(self, message: _Message) -> Any:
        self._served.update(message.served)
        before = dict(self._served)
        for number in message.cancelled:
            self._desk.cancel(self._open.pop(number).future)
        for number, prompt, draw, tenant, adapter in message.requests:
            weights = None if adapter is None else self._adapters[adapter]
            request = Request(self._base, prompt, draw, tenant, lambda own=weights: own)  # type: ignore[misc]
            self._open[number] = request
            self._desk.add(request)
        self._desk.advance()
        finished = []
        for number, request in list(self._open.items()):
            if request.future.done():
                error = request.future.exception()
                samples = None if error is not None else request.future.result()
                finished.append((number, samples, sendable(error)))
                del self._open[number]
        return finished, {tenant: n - before.get(tenant, 0) for tenant, n in self._served.items()}


def sendable(error: BaseException | None) -> Any:
    """An error that can be read where it is sent to: itself, or its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
