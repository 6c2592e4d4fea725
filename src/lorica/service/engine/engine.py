"""Whose turn it is: one thread, which owns the base and every adapter.

run 1   forward_backward ┊ forward_backward ┊ step ┊ …     in order
run 2   forward_backward ┊ step ┊ save ┊ …                 in order
          └── a pass: sequences of all runs, the tenant that had least first ──┐
samples  ── between two passes, for as long as the pass took: a token for each ┘
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lorica.service.engine.base import Base
from lorica.service.engine.datum import Datum
from lorica.service.engine.desk import Desk
from lorica.service.engine.drawing import Draw, Request, Samples
from lorica.service.engine.losses import loss_of
from lorica.service.engine.proof import prove
from lorica.service.engine.several.process import Process
from lorica.service.engine.training import Task, learn
from lorica.service.engine.weights import Learner, Weights
from lorica.service.errors import ServiceDown, UserError

_NOTHING: AbstractContextManager[Any] = nullcontext()


@dataclass(frozen=True, slots=True)
class Output:
    """The result of a call of forward or forward_backward.

    Args:
        logprobs: of each datum's targets, in their shape.
        loss: the sum over all tokens.
    """

    logprobs: tuple[Any, ...]
    loss: float


@dataclass(eq=False)
class _Learn:
    """A call of forward or forward_backward; `at` datums of it are through."""

    tasks: list[Task]
    shapes: list[tuple[int, ...]]
    backward: bool
    learner_of: Callable[[], Learner]
    future: Future[Any] = field(default_factory=Future)
    learner: Learner | None = None
    at: int = 0


@dataclass(eq=False)
class _Call:
    work: Callable[[], Any]
    within: AbstractContextManager[Any]
    future: Future[Any] = field(default_factory=Future)


@dataclass(eq=False)
class _Run:
    """Calls in order, of one adapter."""

    tenant: str
    calls: deque[_Learn | _Call] = field(default_factory=deque)


class Engine:
    """Trains and samples from many adapters on one base.

    What a run gets depends on its own calls alone, to the last bit on a CPU. Among tenants the one that had
    the fewest tokens goes first.

    Args:
        base: the model.
        tokens: of one pass, over all sequences; a longer sequence goes by itself.
        lanes: samples that are written at once.
        served: tenant → tokens so far, of several engines together; None counts this one's.
        process: does its passes; None does them in the thread.
    """

    def __init__(
        self,
        base: Base,
        *,
        tokens: int = 2048,
        lanes: int = 128,
        served: dict[str, int] | None = None,
        process: Process | None = None,
    ) -> None:
        """Start the thread."""
        prove(base)
        self.base, self.tokens = base, tokens
        self.served: dict[str, int] = {} if served is None else served
        self._learn = partial(learn, base) if process is None else process.learn
        self._desk = Desk(base, self.served, lanes) if process is None else process.desk(self.served)
        self._process = process
        self.passes = 0
        self._inbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._runs: dict[str, _Run] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="lorica-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes calls."""
        return self._thread.is_alive() and not self._stopping

    def learn(
        self,
        run: str,
        data: Sequence[Datum],
        loss_fn: str,
        settings: dict[str, float] | None,
        learner: Callable[[], Learner],
        *,
        backward: bool,
        tenant: str = "",
        then: Callable[[Future[Any]], object] | None = None,
    ) -> Future[Output]:
        """Queue forward or forward_backward.

        Args:
            run: whose calls are in order.
            data: the sequences.
            loss_fn: name of the loss.
            settings: of the loss.
            learner: gives the adapter when the call's turn comes.
            backward: whether gradients are added.
            tenant: who pays for the tokens.
            then: called with the future when it is done, before the run's next call is.

        Raises:
            UserError: the data or the loss cannot be used.
            ServiceDown: the engine does not run.
        """
        loss, values = loss_of(loss_fn, settings)
        if not data:
            raise UserError("no data: a call needs at least one datum")
        limits = {"context": self.base.context, "vocabulary": self.base.vocabulary}
        tasks = [Task(datum.ready(loss, loss_fn, **limits), loss, values, None) for datum in data]
        shapes = [tuple(datum.inputs["target_tokens"].shape) for datum in data]
        call = _Learn(tasks, shapes, backward, learner)
        if then is not None:
            call.future.add_done_callback(then)
        self._post(self._add, run, tenant, call)
        return call.future

    def call(
        self,
        run: str,
        work: Callable[[], Any],
        *,
        within: AbstractContextManager[Any] = _NOTHING,
        tenant: str = "",
        then: Callable[[Future[Any]], object] | None = None,
    ) -> Future[Any]:
        """Queue something that touches a run's adapter, in order with its other calls.

        Args:
            run: whose calls are in order.
            work: the function to call, in the engine's thread.
            within: entered for the work and for `then`: a lock, where only one engine at a time may do such.
            tenant: whose run it is.
            then: as in `learn`.
        """
        call = _Call(work, within)
        if then is not None:
            call.future.add_done_callback(then)
        self._post(self._add, run, tenant, call)
        return call.future

    def sample(
        self,
        prompt: Sequence[int],
        weights: Callable[[], Weights | None],
        draw: Draw,
        *,
        tenant: str = "",
        after: Future[Any] | None = None,
        then: Callable[[Future[Any]], object] | None = None,
    ) -> Future[Samples]:
        """Queue a request for samples.

        Args:
            prompt: token ids.
            weights: gives the adapter when its turn comes; None for the base.
            draw: how samples are drawn.
            tenant: who pays for the tokens.
            after: wait for this one first.
            then: called with the future when it is done.

        Raises:
            UserError: it cannot be drawn.
            ServiceDown: the engine does not run.
        """
        draw.check(prompt, self.base)
        request = Request(self.base, list(prompt), draw, tenant, weights)
        if then is not None:
            request.future.add_done_callback(then)
        if after is None:
            self._post(self._desk.add, request)
        else:
            after.add_done_callback(lambda _: self._post_or_fail(request))
        return request.future

    def cancel(self, drawing: Future[Samples]) -> None:
        """Give up a request for samples that `sample` queued."""
        self._post(self._desk.cancel, drawing)

    def stop(self) -> None:
        """End the thread; calls that wait end with `ServiceDown`."""
        self._stopping = True
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, what: Callable[..., None], *args: Any) -> None:
        if not self.alive:
            raise ServiceDown("the engine has stopped")
        self._inbox.put((what, args))

    def _post_or_fail(self, request: Request) -> None:
        try:
            self._post(self._desk.add, request)
        except ServiceDown as error:
            request.future.set_exception(error)

    def _add(self, run: str, tenant: str, call: _Learn | _Call) -> None:
        self._runs.setdefault(run, _Run(tenant)).calls.append(call)

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._receive(block=not (self._runs or self._desk.busy))
                if self._stopping:
                    break
                self._do_calls()
                took = self._train()
                self._write(time.monotonic() + took)
        except ServiceDown:
            pass  # its process has ended
        finally:
            self._stopping = True
            self._fail_all()
            if self._process is not None:
                self._process.end()

    def _receive(self, *, block: bool) -> None:
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                return
            if item is not None:
                what, args = item
                what(*args)
            elif self._stopping:
                return
            block = False

    def _do_calls(self) -> None:
        """Everything but passes, of each run, as far as it is its turn."""
        for name, run in list(self._runs.items()):
            while run.calls and isinstance(call := run.calls[0], _Call):
                run.calls.popleft()
                if call.future.set_running_or_notify_cancel():
                    with call.within:
                        _settle(call.future, call.work)
            if not run.calls:
                del self._runs[name]

    def _train(self) -> float:
        """One pass; returns the seconds that it took."""
        picked = self._pick()
        if not picked:
            return 0.0
        started = time.monotonic()
        tasks = [task for _, task in picked]
        try:
            self._learn(tasks, backward=picked[0][0].backward)
        except Exception as error:
            for call in {call for call, _ in picked}:
                self._end(call, error)
            if isinstance(error, ServiceDown):
                raise
        self.passes += 1
        for call, task in picked:
            if task.error is not None:
                self._end(call, task.error)
        for call in dict.fromkeys(call for call, _ in picked):
            if call.at == len(call.tasks) and not call.future.done():
                logprobs = [
                    t.logprobs.reshape(shape) for t, shape in zip(call.tasks, call.shapes, strict=True)
                ]
                self._end(call, Output(tuple(logprobs), sum(task.loss_sum for task in call.tasks)))
        return time.monotonic() - started

    def _pick(self) -> list[tuple[_Learn, Task]]:
        """Sequences for a pass, one after the other from the tenant that had least."""
        runs = [run for run in self._runs.values() if run.calls and isinstance(run.calls[0], _Learn)]
        floor = min((self.served.get(run.tenant, 0) for run in runs), default=0)
        picked: list[tuple[_Learn, Task]] = []
        tokens, backward = 0, None
        open_runs = {id(run): (run, iter(_tasks(run))) for run in runs}
        ahead = {key: next(source, None) for key, (_, source) in open_runs.items()}
        now = {run.tenant: max(self.served.get(run.tenant, 0), floor) for run in runs}
        while True:
            ready = [
                key
                for key, item in ahead.items()
                if item is not None and backward in (None, item[0].backward)
            ]
            if not ready:
                break
            key = min(ready, key=lambda key: now[open_runs[key][0].tenant])
            run, source = open_runs[key]
            call, task = ahead[key]  # type: ignore[misc]
            size = len(task.datum)
            if picked and tokens + size > self.tokens:
                break
            ahead[key] = next(source, None)
            if call.learner is None:
                try:
                    call.learner = call.learner_of()
                except Exception as error:
                    self._end(call, error)
                    ahead[key] = None
                    continue
            task.weights = call.learner
            picked.append((call, task))
            call.at += 1
            backward = call.backward
            tokens += size
            now[run.tenant] += size
            # Others may have added to it meanwhile.
            self.served[run.tenant] = max(self.served.get(run.tenant, 0), floor) + size
        return picked

    def _end(self, call: _Learn, outcome: Output | Exception) -> None:
        """Answer a call, and let the run's next one come; one that failed leaves no half of a gradient."""
        if isinstance(outcome, Exception) and call.learner is not None and call.backward:
            call.learner.gradient.zero_()
        for name, run in list(self._runs.items()):
            if call in run.calls:
                run.calls.remove(call)
                if not run.calls:
                    del self._runs[name]
        if call.future.set_running_or_notify_cancel():
            if isinstance(outcome, Exception):
                call.future.set_exception(outcome)
            else:
                call.future.set_result(outcome)

    def _write(self, until: float) -> None:
        """Tokens for the samples, at least one for each, while there is time or nothing else to do."""
        while self._desk.busy:
            self._desk.advance()
            self._receive(block=False)
            if self._stopping or (self._runs and time.monotonic() >= until):
                return

    def _fail_all(self) -> None:
        self._receive(block=False)
        down = ServiceDown("the engine has stopped")
        futures: list[Future[Any]] = [call.future for run in self._runs.values() for call in run.calls]
        futures += [request.future for request in self._desk.end()]
        for future in futures:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(down)


def _tasks(run: _Run) -> Iterable[tuple[_Learn, Task]]:
    """A run's waiting calls of one sort, before its next call of another."""
    for call in run.calls:
        if not isinstance(call, _Learn) or call.backward is not run.calls[0].backward:  # type: ignore[union-attr]
            return
        for task in call.tasks[call.at :]:
            yield call, task


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
