"""Checkpoints and snapshots: folders with PEFT's files, and their rows.

runs/RUN/weights/NAME         to continue from: with the optimizer
runs/RUN/snapshot-N           the same, for the server itself: all that the run's first N calls did
runs/RUN/external_weights/NAME   to be fetched
    adapters/RUN.NAME             to sample from and to serve: a plain adapter
runs/RUN/sampler_weights/snapshot-N   without a name, to sample from: it goes with the session, or a day
                                      after its last use
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import threading
import time
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lorica.service import files
from lorica.service.engine.base import Base
from lorica.service.engine.weights import Learner, Weights
from lorica.service.errors import UserError
from lorica.service.state.registry import Registry, Row
from lorica.service.state.runs import OpenRun, check_checkpoint, folder_name, write_whole
from lorica.service.state.tenants import Tenant, check_bytes

_SAMPLERS = 64
_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_SOON, _LATE, _DAY = 3600, 10 * 366 * 86400, 86400

Kind = Literal["weights", "sampler_weights", "external_weights"]


class Checkpoints:
    """The checkpoints of all runs.

    Args:
        folder: the service's.
        registry: of their rows.
        base: whose adapters they are.
    """

    def __init__(self, folder: Path, registry: Registry, base: Base) -> None:
        """Read nothing yet."""
        self._folder, self._registry, self._base = folder, registry, base
        self._loaded: OrderedDict[str, Weights] = OrderedDict()
        self._lock = threading.Lock()
        self.published = folder / "adapters"
        self.published.mkdir(parents=True, exist_ok=True)

    def folder(self, row: Row) -> Path:
        """The folder of a checkpoint."""
        run, name = folder_name(row["run"]), row["name"]
        if row["kind"] == "sampler_weights" and row["listed"]:
            return self.published / f"{run}.{name}"
        return self._folder / "runs" / run / row["kind"] / name

    def write(self, run: OpenRun, kind: Kind, name: str, body: dict[str, Any], *, listed: bool = True) -> Row:
        """Write a checkpoint's files; `add` makes it one.

        Args:
            run: whose adapter is written.
            kind: its purpose.
            name: of it.
            body: the request: ``ttl_seconds``, ``overwrite``, ``user_metadata``.
            listed: whether it has a name that a client gave.

        Raises:
            UserError: the name is taken or cannot be one, the time to live is none, or the disk is used up.
        """
        path = f"tinker://{run.id}/{kind}/{check_checkpoint(name)}"
        taken = self._registry.all("checkpoints", path=path)
        if taken and not body.get("overwrite"):
            raise UserError(f"there is a checkpoint {path} already; give another name, or overwrite=True")
        ttl = time_to_live(body) if listed else _DAY
        optimizer = kind == "weights"
        learner = run.ready()
        used = self._registry.total(run.tenant.name) - sum(row["size"] for row in taken)
        check_bytes(run.tenant, used, learner.flat.nbytes * (3 if optimizer else 1))
        now = time.time()
        row = Row(
            path=path,
            tenant=run.tenant.name,
            run=run.id,
            kind=kind,
            name=name,
            created=now,
            expires=None if ttl is None else now + ttl,
            optimizer=int(optimizer),
            about=body.get("user_metadata"),
            listed=int(listed),
            public=0,
        )
        row["size"] = write_whole(learner, self.folder(row), optimizer=optimizer)
        return row

    def copy(self, source: Row, tenant: Tenant, run: str, body: dict[str, Any]) -> Row:
        """A checkpoint once more, for a run that holds nothing else; asked again it is the same copy.

        Args:
            source: the checkpoint; its files are shared.
            tenant: who has the copy.
            run: its id; nobody's yet.
            body: the request: ``ttl_seconds``.

        Raises:
            UserError: the run is there already, the time to live is none, or the disk is used up.
        """
        path, now, ttl = f"tinker://{run}/{source['kind']}/{source['name']}", time.time(), time_to_live(body)
        if copied := self._registry.all("checkpoints", path=path, tenant=tenant.name):
            return copied[0]
        if self._registry.all("runs", id=run):
            raise UserError(f"there is a run {run!r} already; give another model_seq_id")
        check_bytes(tenant, self._registry.total(tenant.name), source["size"])
        own = {"path": path, "tenant": tenant.name, "run": run, "created": now, "public": 0, "listed": 1}
        row = Row({**source, **own, "expires": None if ttl is None else now + ttl})
        stage = self.folder(row).with_name(f".{self.folder(row).name}.new")
        shutil.rmtree(stage, ignore_errors=True)
        shutil.copytree(self.folder(source), stage, copy_function=os.link)
        stage.rename(self.folder(row))
        from_run = self._registry.one("runs", source["run"])
        about = {"made": from_run["made"], "rank": from_run["rank"], "about": None, "unloaded": 1}
        with self._registry.together():
            session = run.partition(":")[0]
            owned = {"id": run, "tenant": tenant.name, "session": session, "created": now, "used": now}
            self._registry.add("runs", **owned, **about)
            self.add(row)
        return row

    def add(self, row: Row) -> None:
        """Have a checkpoint that was written be one."""
        self._registry.remove("checkpoints", row["path"])
        self._registry.add("checkpoints", **row)
        self._forget(row)

    def remove(self, row: Row) -> None:
        """Take a checkpoint away."""
        self._registry.remove("checkpoints", row["path"])
        self._forget(row)
        shutil.rmtree(self.folder(row), ignore_errors=True)

    def _forget(self, row: Row) -> None:
        with self._lock:
            self._loaded.pop(row["path"], None)

    def forget_unnamed(self, session: str) -> None:
        """Take away what a session sampled from without giving it a name."""
        for run in self._registry.all("runs", session=session):
            for row in self._registry.all("checkpoints", run=run["id"], listed=0):
                self.remove(row)

    def used(self, row: Row) -> None:
        """Somebody samples from a checkpoint: one without a name lasts a day more."""
        until = time.time() + _DAY
        if not row["listed"] and row["expires"] < until - _SOON:
            self._registry.change("checkpoints", row["path"], expires=until)

    def weights(self, row: Row) -> Weights:
        """A checkpoint's adapter, to sample from."""
        path = row["path"]
        with self._lock:
            if path not in self._loaded:
                adapter, _ = files.read(self.folder(row), optimizer=False)
                self._loaded[path] = Weights(adapter, self._base.model)
                while len(self._loaded) > _SAMPLERS:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(path)
            return self._loaded[path]

    def learner(self, folder: Path, *, optimizer: bool) -> Learner:
        """An adapter to go on with, from a checkpoint's or a snapshot's folder."""
        adapter, moments = files.read(folder, optimizer=optimizer)
        learner = Learner(adapter, self._base.model)
        learner.take(adapter, moments)
        return learner

    # Snapshots.

    def snapshot(self, run: str, seq: int) -> Path:
        """The folder of a run's snapshot."""
        return self._folder / "runs" / folder_name(run) / f"snapshot-{seq}"

    def write_snapshot(self, run: OpenRun, seq: int) -> None:
        """Write all that a run's calls up to a number did; the gradient is zero."""
        write_whole(run.ready(), self.snapshot(run.id, seq), optimizer=True)
        run.saved = time.monotonic()

    def remove_snapshots(self, run: str, but: int | None = None) -> None:
        """Take away a run's snapshots, or all but one."""
        for folder in (self._folder / "runs" / folder_name(run)).glob("snapshot-*"):
            if folder.name != f"snapshot-{but}":
                shutil.rmtree(folder, ignore_errors=True)

    # For clients.

    def described(self, row: Row) -> dict[str, Any]:
        """A checkpoint as the protocol describes it."""
        return {
            "checkpoint_id": f"{row['kind']}/{row['name']}",
            "checkpoint_type": _KINDS[row["kind"]],
            "time": moment(row["created"]),
            "tinker_path": row["path"],
            "size_bytes": row["size"],
            "public": bool(row["public"]),
            "user_metadata": row.about,
            "expires_at": None if row["expires"] is None else moment(row["expires"]),
        }

    def files(self, row: Row) -> dict[str, Path]:
        """PEFT's files of a checkpoint, by name."""
        return {
            path.name: path for path in sorted(self.folder(row).iterdir()) if path.name != files.OPTIMIZER
        }

    def archive(self, row: Row) -> bytes:
        """PEFT's files of a checkpoint, in a tar file."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, path in self.files(row).items():
                tar.add(path, arcname=name, recursive=False)
        return out.getvalue()


def time_to_live(body: dict[str, Any]) -> float | None:
    """A request's ``ttl_seconds``; None keeps the checkpoint.

    Raises:
        UserError: it is no time, or none that a checkpoint may have.
    """
    ttl = body.get("ttl_seconds")
    if ttl is not None and not (isinstance(ttl, int | float) and _SOON <= ttl <= _LATE):
        raise UserError(f"ttl_seconds must be {_SOON} (an hour) to ten years, not {ttl!r}")
    return ttl


def moment(seconds: float) -> str:
    """Seconds since the epoch, as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()
