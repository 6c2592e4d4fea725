"""The service: the verbs, durable. A call is written down before it is answered, and done in order.

    accept ─▶ registry ─▶ (its turn) ─▶ engine ─▶ registry ─▶ the client

A server that is killed comes back with every call that it accepted: what was done is done, and what was not
is done now. A run is brought back by its last snapshot and its calls since: on a CPU with the same bits.
"""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from lorica.errors import LoricaError
from lorica.service import wire
from lorica.service.engine.base import Base
from lorica.service.engine.several.engines import Engines
from lorica.service.errors import ServiceDown, UserError
from lorica.service.state.calls import Calls, Done
from lorica.service.state.checkpoints import Checkpoints
from lorica.service.state.registry import Call, Registry
from lorica.service.state.runs import OpenRun
from lorica.service.state.tenants import Tenant, Tenants

_KEPT = 3600.0
"""Seconds for which a result that is no part of a run's log can be fetched again."""


class Service:
    """Training as a service, in one process and one folder.

    Args:
        base: the model.
        folder: folder of the durable part; created if missing.
        tenants: who shares it.
        snapshot: seconds of a run's work that may have to be done again after a kill.
        patience: seconds without a heartbeat after which a session's adapters leave memory; its runs come
            back with their next call.
        tokens: of one pass.
        lanes: samples that are written at once.
        engines: passes at once, as of `Client`.
    """

    def __init__(
        self,
        base: Base,
        folder: str | Path,
        tenants: Tenants | None = None,
        *,
        snapshot: float = 30.0,
        patience: float = 600.0,
        tokens: int = 2048,
        lanes: int = 128,
        engines: int = 1,
    ) -> None:
        """Open the folder, and go on with its calls."""
        self.base, self.folder = base, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.registry = Registry(self.folder / "registry.sqlite")
        self.engine = Engines(base, engines, tokens=tokens, lanes=lanes)
        self.tenants = Tenants() if tenants is None else tenants
        self.checkpoints = Checkpoints(self.folder, self.registry, base)
        self._calls = Calls(base, self.registry, self.checkpoints)
        self._snapshot, self._patience = snapshot, patience
        self.secret = secrets.token_bytes(32)
        self._lock = threading.RLock()
        self._alone = threading.Lock()
        self._runs: dict[str, OpenRun] = {}
        self._promises: dict[str, Future[None]] = {}
        self._drawing: dict[str, Future[Any]] = {}
        self._over = threading.Event()
        waiting = self.registry.waiting()
        self._promises.update((call.id, _promise()) for call in waiting)
        with self._lock:
            for call in waiting:
                self._dispatch(call)
        self._keeper = threading.Thread(target=self._keep, name="lorica-keeper", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """Stop; calls accepted and not done wait in the folder."""
        self._over.set()
        self.engine.stop()
        self._keeper.join()
        self.registry.close()

    # Sessions.

    def create_session(self, tenant: Tenant, about: Mapping[str, Any]) -> str:
        """Begin a session; returns its id."""
        session, now = uuid.uuid4().hex, time.time()
        self.registry.add(
            "sessions", id=session, tenant=tenant.name, created=now, seen=now, about=dict(about)
        )
        return session

    def heartbeat(self, tenant: Tenant, session: str) -> None:
        """A session's client is there still.

        Raises:
            GoneError: there is no such session.
        """
        self.registry.one("sessions", session, tenant.name)
        self.registry.change("sessions", session, seen=time.time(), ended=0)

    def finish_session(self, tenant: Tenant, session: str) -> None:
        """A session is over: its adapters leave memory, and what has no name the folder.

        Raises:
            GoneError: there is no such session.
        """
        self.registry.one("sessions", session, tenant.name)
        self.registry.change("sessions", session, ended=1)
        self.checkpoints.forget_unnamed(session)
        self._rest(session)

    def create_sampler(self, tenant: Tenant, session: str, seq: int, path: str | None) -> str:
        """A sampling session on a checkpoint, or on the base; returns its id.

        Raises:
            GoneError: there is no such session or checkpoint.
        """
        self.registry.one("sessions", session, tenant.name)
        if path is not None:
            self.registry.readable(path, tenant.name)
        sampler = f"{session}:sample:{seq}"
        self.registry.add(
            "samplers", id=sampler, tenant=tenant.name, session=session, path=path, created=time.time()
        )
        return sampler

    # Calls.

    def accept(self, tenant: Tenant, target: str, seq: int, kind: str, body: bytes) -> str:
        """Write a call down, and have it done when its turn comes. The same number is the same call.

        Args:
            tenant: whose it is.
            target: the run that it is for; the session, of a call that makes one; the sampler.
            seq: its number there.
            kind: ``"create"``, ``"learn"``, ``"step"``, ``"save"``, ``"publish"``, ``"load"``,
                ``"unload"`` or ``"sample"``.
            body: the request.

        Returns:
            The id by which `result` gives its result.

        Raises:
            GoneError: there is no such target.
            UserError: the number cannot be one.
            ServiceDown: the engine has stopped.
        """
        if not self.engine.alive:
            raise ServiceDown("the engine has stopped")
        table = {"create": "sessions", "sample": "samplers"}.get(kind, "runs")
        if not target.startswith("direct:"):
            self.registry.one(table, target, tenant.name)
        if not 0 <= seq < 1 << 62:
            raise UserError(f"the call's number must be 0 or more, and fit 62 bits; it is {seq}")
        what = ":create" if kind == "create" else ""
        call = Call(f"{target}{what}:{seq}", tenant.name, target, seq, kind, body, None, None)
        with self._lock:
            # Known before it is written down: a result must not come before there is somebody to tell.
            promise = _promise()
            self._promises.setdefault(call.id, promise)
            if self.registry.accept(call):
                self._dispatch(call)
            elif self._promises[call.id] is promise:
                del self._promises[call.id]
        return call.id

    def unload(self, tenant: Tenant, run: str) -> str:
        """Let a run's adapter go for good, after its other calls; returns the call's id.

        Raises:
            GoneError: there is no such run.
        """
        self.registry.one("runs", run, tenant.name)
        with self._lock:
            opened = self._open(run)
            last = max([opened.next - 1, *opened.held])
            return self.accept(tenant, run, last + 1, "unload", b"{}")

    def cancel(self, tenant: Tenant, call_id: str) -> None:
        """Give up a request for samples; one that is done stays so.

        Raises:
            GoneError: there is no such call, or it is another tenant's.
            UserError: it is a call of a run, whose calls are done in order.
        """
        if self.registry.call(call_id, tenant.name).kind != "sample":
            raise UserError("only samples can be cancelled; the calls of a run are done in order")
        drawing = self._drawing.get(call_id)
        if drawing is not None:
            self.engine.cancel(drawing)

    def promise(self, tenant: Tenant, call_id: str) -> Future[None] | None:
        """The future to wait for; None where the call is done.

        Raises:
            GoneError: there is no such call, or it is another tenant's.
        """
        call = self.registry.call(call_id, tenant.name)
        return None if call.result is not None else self._promises.get(call_id)

    def result(self, tenant: Tenant, call_id: str) -> Call:
        """A call with its result.

        Raises:
            GoneError: there is no such call, or it is another tenant's.
        """
        return self.registry.call(call_id, tenant.name)

    # A call's way.

    def _dispatch(self, call: Call) -> None:
        """Give a call to the engine, or keep it until its turn."""
        if call.kind == "sample":
            self._sample(call)
        elif call.kind == "create":
            run = OpenRun(f"{call.target}:train:{call.seq}", self.tenants.named(call.tenant))
            self._runs[run.id] = run
            self._start(run, call)
        else:
            run = self._open(call.target)
            if call.seq < run.next:
                self.registry.done(call.id, b"this number was used by an earlier call", "user")
                return
            run.held[call.seq] = call
            while run.next in run.held:
                self._start(run, run.held.pop(run.next))
                run.next += 1

    def _open(self, run_id: str) -> OpenRun:
        """An open run: its snapshot is read and its calls since are done again, before any other."""
        if run_id in self._runs:
            return self._runs[run_id]
        row = self.registry.one("runs", run_id)
        run = self._runs[run_id] = OpenRun(run_id, self.tenants.named(row["tenant"]))
        run.pending += 1
        reopen = partial(self._calls.reopen, run, row)
        self.engine.call(run_id, reopen, tenant=row["tenant"], then=partial(self._opened, run))
        run.next = max(row["snapshot"], 0) + 1
        for call in self.registry.calls_after(run_id, run.next - 1):
            if call.result is None:
                break
            if call.kind in ("learn", "step"):
                self._start(run, call)
            run.next += 1
        return run

    def _start(self, run: OpenRun, call: Call) -> None:
        """Queue a run's call; one that was done before is done again, and told to nobody."""
        run.pending += 1
        then = partial(self._over_with, run, call)
        try:
            if call.kind == "learn":
                request = wire.Learn(call.body or b"")
                self.engine.learn(
                    run.id,
                    request.data(),
                    request.loss_fn,
                    request.settings(),
                    run.ready,
                    backward=request.backward,
                    tenant=run.tenant.name,
                    then=then,
                )
            else:
                work = partial(self._do, run, call)
                # What looks at a quota and then uses some of it: one at a time, until it is written down.
                within = nullcontext() if call.kind == "step" else self._alone
                self.engine.call(run.id, work, within=within, tenant=run.tenant.name, then=then)
        except Exception as error:
            then(_failed(error))

    def _do(self, run: OpenRun, call: Call) -> Done:
        """The work of a call, in the engine's thread."""
        done = self._calls.do(run, call)
        due = time.monotonic() - run.saved >= self._snapshot
        if call.result is None and (done.snapshot or (call.kind == "step" and due)):
            self.checkpoints.write_snapshot(run, call.seq)
            return done._replace(snapshot=True)
        return done

    def _over_with(self, run: OpenRun, call: Call, future: Future[Any]) -> None:
        if call.result is None:
            self._finish(call, future)
        with self._lock:
            run.pending -= 1
            if call.kind == "create" and future.exception() is not None:
                self._runs.pop(run.id, None)

    def _opened(self, run: OpenRun, _: Future[Any]) -> None:
        with self._lock:
            run.pending -= 1

    def _sample(self, call: Call) -> None:
        try:
            prompt, weights, draw = self._calls.sample(call)
            then = partial(self._finish, call, prompt=len(prompt))
            drawing = self.engine.sample(prompt, weights, draw, tenant=call.tenant, then=then)
            self._drawing[call.id] = drawing
            drawing.add_done_callback(lambda _: self._drawing.pop(call.id, None))
        except Exception as error:
            self._finish(call, _failed(error))

    def _finish(self, call: Call, future: Future[Any], prompt: int = 0) -> None:
        """Write down a call's result, and tell the client."""
        error = future.exception()
        if isinstance(error, ServiceDown):  # it is done when the server is back
            return
        value, snapshot = None, None
        if error is not None:
            user = isinstance(error, LoricaError)
            text = str(error) if user else f"{type(error).__name__}: {error}"
            result, failed = text.encode(), "user" if user else "server"
        else:
            value, failed = future.result(), None
            if call.kind == "learn":
                result = wire.learned(value)
            elif call.kind == "sample":
                result = wire.sampled(value, prompt)
            else:
                assert isinstance(value, Done)
                result = wire.as_json(value.answer)
                snapshot = call.seq if value.snapshot else None
        with self.registry.together():
            if isinstance(value, Done):
                value.commit()
            self.registry.done(call.id, result, failed)
            if snapshot is not None:
                self.registry.snapshot(call.target, snapshot)
        if snapshot is not None:
            self.checkpoints.remove_snapshots(call.target, but=snapshot)
        with self._lock:
            promise = self._promises.pop(call.id, None)
        if promise is not None:
            promise.set_result(None)

    # Housekeeping.

    def _keep(self) -> None:
        while not self._over.wait(min(30.0, self._patience / 4)):
            now = time.time()
            for session in self.registry.all("sessions", ended=0):
                if session["seen"] < now - self._patience:
                    self._rest(session["id"])
            for checkpoint in self.registry.expired(now):
                self.checkpoints.remove(checkpoint)
            self.registry.forget(now - _KEPT)

    def _rest(self, session: str) -> None:
        """Let a session's adapters leave memory."""
        for run in list(self._runs.values()):
            if run.id.startswith(f"{session}:") and self.engine.alive:
                self.engine.call(run.id, partial(self._leave, run), tenant=run.tenant.name)

    def _leave(self, run: OpenRun) -> None:
        with self._lock:
            if run.pending or run.held or self._runs.get(run.id) is not run:
                return
            if run.learner is not None and not run.learner.gradient.any():
                self.checkpoints.write_snapshot(run, run.next - 1)
                self.registry.snapshot(run.id, run.next - 1)
                self.checkpoints.remove_snapshots(run.id, but=run.next - 1)
            del self._runs[run.id]


def _failed(error: Exception) -> Future[Any]:
    """A call that failed before the engine had it: without an answer it would be tried at every start."""
    failed: Future[Any] = Future()
    failed.set_exception(error)
    return failed


def _promise() -> Future[None]:
    """A result that no client who waits for it can cancel."""
    promise: Future[None] = Future()
    promise.set_running_or_notify_cancel()
    return promise
