"""The work of each sort of call, in the engine's thread and in its turn."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from lorica.adapter import Adapter
from lorica.service import wire
from lorica.service.engine.base import Base
from lorica.service.engine.drawing import Draw
from lorica.service.engine.weights import Adam, Learner, Make, Weights, start
from lorica.service.errors import GoneError, UserError, reading
from lorica.service.state.checkpoints import Checkpoints
from lorica.service.state.registry import Call, Registry, Row
from lorica.service.state.runs import OpenRun
from lorica.service.state.tenants import check_runs


class Done(NamedTuple):
    """The outcome of a call.

    Args:
        answer: for the client.
        commit: writes more into the registry together with the answer.
        snapshot: whether the run needs a snapshot: the work cannot be done again from the call alone.
    """

    answer: dict[str, Any]
    commit: Callable[[], object] = lambda: None
    snapshot: bool = False


class Calls:
    """Does calls.

    Args:
        base: the model.
        registry: what is written down.
        checkpoints: of all runs.
    """

    def __init__(self, base: Base, registry: Registry, checkpoints: Checkpoints) -> None:
        """Hold them."""
        self._base, self._registry, self._checkpoints = base, registry, checkpoints

    def do(self, run: OpenRun, call: Call) -> Done:
        """Do a call of a run, other than `learn`.

        Raises:
            UserError: it cannot be done.
        """
        body = json.loads(call.body or b"{}")
        return getattr(self, f"_{call.kind}")(run, call, body)

    def reopen(self, run: OpenRun, row: Row) -> None:
        """Bring a run's adapter back, as its last snapshot or its first call has it."""
        if row["unloaded"]:
            return
        if row["snapshot"] >= 0:
            folder = self._checkpoints.snapshot(row["id"], row["snapshot"])
            run.learner = self._checkpoints.learner(folder, optimizer=True)
        else:
            run.learner = Learner(self._drawn(Make(**json.loads(row["made"]))), self._base.model)

    def _drawn(self, make: Make) -> Adapter:
        return start(self._base.model, make, self._base.targets, name=self._base.name)

    def _create(self, run: OpenRun, call: Call, body: dict[str, Any]) -> Done:
        """A new run: with a new adapter, or with a checkpoint's."""
        check_base(body.get("base_model"), self._base)
        kind = (body.get("optimizer_config") or {}).get("type", "adamw")
        if kind != "adamw":
            raise UserError(f"optimizer {kind!r} is not carried by this server; it has 'adamw'")
        others = self._registry.all("runs", tenant=call.tenant, unloaded=0)
        check_runs(run.tenant, [row for row in others if row["id"] != run.id and self._lives(row)])
        loaded = "path" in body
        if loaded:
            row = self._source(body["path"], call.tenant)
            run.learner = self._checkpoints.learner(
                self._checkpoints.folder(row), optimizer=self._with_optimizer(row, body)
            )
            made = {"rank": run.learner.config.r}
        else:
            with reading("lora_config"):
                given: dict[str, Any] = dict(body.get("lora_config") or {})
            unknown = sorted(set(given) - set(Make.__slots__))
            if unknown:
                raise UserError(f"lora_config has fields that are not carried: {unknown}")
            given["seed"] = _seed(call, given.get("seed"))
            with reading("lora_config"):
                make = Make(**given)
            run.learner = Learner(self._drawn(make), self._base.model)
            made = asdict(make)
        now = time.time()
        values = {
            "id": run.id,
            "tenant": call.tenant,
            "session": call.target,
            "made": made,
            "rank": made["rank"],
            "created": now,
            "used": now,
            "about": body.get("user_metadata"),
        }
        answer: dict[str, Any] = {"model_id": run.id, "type": "load_weights" if loaded else "create_model"}
        if loaded:
            answer["path"] = body["path"]
            self._checkpoints.write_snapshot(run, 0)
            values["snapshot"] = 0
        return Done(answer, lambda: self._registry.add("runs", **values))

    def _lives(self, row: Row) -> bool:
        return not self._registry.one("sessions", row["session"])["ended"]

    def _source(self, path: str, tenant: str) -> Row:
        try:
            return self._registry.readable(path, tenant)
        except GoneError as error:
            raise UserError(str(error)) from None

    def _with_optimizer(self, row: Row, body: dict[str, Any]) -> bool:
        wanted = bool(body.get("optimizer"))
        if wanted and not row["optimizer"]:
            raise UserError(
                f"{row['path']} was saved for sampling, without its optimizer; load weights alone"
            )
        return wanted

    def _step(self, run: OpenRun, call: Call, body: dict[str, Any]) -> Done:
        given = body.get("adam_params")
        if given is None:
            raise UserError(f"optimizer {body.get('optimizer_params')} is not carried; send adam_params")
        with reading("adam_params"):
            settings = Adam(**{name: float(value) for name, value in given.items()})
        told = run.ready().step(settings)
        return Done({"metrics": {"grad_norm:mean": told["grad_norm"]}, "type": "optim_step"})

    def _load(self, run: OpenRun, call: Call, body: dict[str, Any]) -> Done:
        row = self._source(body["path"], call.tenant)
        other = self._checkpoints.learner(
            self._checkpoints.folder(row), optimizer=self._with_optimizer(row, body)
        )
        run.ready().take(other.adapter(), other.moments() if body.get("optimizer") else None)
        return Done({"path": body["path"], "model_id": run.id, "type": "load_weights"}, snapshot=True)

    def _save(self, run: OpenRun, call: Call, body: dict[str, Any]) -> Done:
        name = body.get("path") or f"{call.seq:06d}"
        row = self._checkpoints.write(run, "weights", name, body)
        return Done({"path": row["path"], "type": "save_weights"}, lambda: self._checkpoints.add(row))

    def _publish(self, run: OpenRun, call: Call, body: dict[str, Any]) -> Done:
        """Weights to sample from: under a name, or for a sampling session alone."""
        if body.get("kind", "snapshot") != "snapshot":
            raise UserError(f"kind={body['kind']!r} is not carried by this server; it has 'snapshot'")
        name, seq = body.get("path"), body.get("sampling_session_seq_id")
        row = self._checkpoints.write(
            run, "sampler_weights", name or f"snapshot-{call.seq}", body, listed=name is not None
        )
        answer = {"path": row["path"], "type": "save_weights_for_sampler"}
        if seq is None:
            return Done(answer, lambda: self._checkpoints.add(row))
        session = run.id.partition(":")[0]
        sampler = f"{session}:sample:{seq}"

        def commit() -> None:
            self._checkpoints.add(row)
            values = {"id": sampler, "tenant": call.tenant, "session": session, "path": row["path"]}
            self._registry.add("samplers", **values, created=time.time())

        return Done({**answer, "sampling_session_id": sampler}, commit)

    def _export(self, run: OpenRun, call: Call, body: dict[str, Any]) -> Done:
        """PEFT's files to be fetched."""
        if body.get("age_encryption_recipients"):
            raise UserError("age_encryption_recipients is not carried by this server")
        row = self._checkpoints.write(run, "external_weights", body.get("path") or f"{call.seq:06d}", body)
        answer = {"path": row["path"], "size_bytes": row["size"], "type": "save_weights_external"}
        return Done(answer, lambda: self._checkpoints.add(row))

    def _unload(self, run: OpenRun, call: Call, body: dict[str, Any]) -> Done:
        run.learner = None

        def commit() -> None:
            self._registry.change("runs", run.id, unloaded=1)
            self._checkpoints.remove_snapshots(run.id)

        return Done({"model_id": run.id, "type": "unload_model"}, commit)

    def sample(self, call: Call) -> tuple[list[int], Callable[[], Weights | None], Draw]:
        """The parts of a request for samples: prompt, adapter, settings of the drawing.

        Raises:
            UserError: it asks for a feature that is not carried.
            GoneError: its sampler or checkpoint is gone.
        """
        body = json.loads(call.body or b"{}")
        path = body.get("model_path")
        if not call.target.startswith("direct:"):
            path = self._registry.one("samplers", call.target)["path"]
        elif path is None:
            check_base(body.get("base_model"), self._base)
        draw = wire.draw_of(body, _seed(call, None))
        if path is None:
            return wire.prompt_of(body), lambda: None, draw
        row = self._source(path, call.tenant)
        self._checkpoints.used(row)
        return wire.prompt_of(body), lambda: self._checkpoints.weights(row), draw


def check_base(name: str | None, base: Base) -> None:
    """Refuse another base than the one there is.

    Raises:
        UserError: naming it.
    """
    if name is not None and name != base.name:
        raise UserError(f"base_model={name!r} is not served here; {base.name!r} is")


def _seed(call: Call, given: int | None) -> int:
    """The seed that a call gives, or one drawn from its id: done again it is the same."""
    if given is not None:
        if not isinstance(given, int) or not -(1 << 63) <= given < 1 << 63:
            raise UserError(f"seed must be a whole number of 64 bits, not {given!r}")
        return given
    return int.from_bytes(hashlib.sha256(call.id.encode()).digest()[:6], "big")
