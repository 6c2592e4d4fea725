"""A run that is open: its adapter in the engine, and its calls in the order of their numbers."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from lorica.service import files
from lorica.service.engine.weights import Learner
from lorica.service.errors import UserError
from lorica.service.state.registry import Call
from lorica.service.state.tenants import Tenant

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(eq=False)
class OpenRun:
    """A run whose calls can be carried out.

    Args:
        id: of the run.
        tenant: whose it is.
        next: number of the call that comes next.
        held: calls that came before their turn.
        pending: calls that the engine has.
        learner: its adapter, once the engine has made it.
        saved: when its last snapshot was written, by the monotonic clock.
    """

    id: str
    tenant: Tenant
    next: int = 1
    held: dict[int, Call] = field(default_factory=dict)
    pending: int = 0
    learner: Learner | None = None
    saved: float = field(default_factory=time.monotonic)

    def ready(self) -> Learner:
        """Its adapter.

        Raises:
            UserError: it could not be made, as its first call said.
        """
        if self.learner is None:
            raise UserError(f"the run {self.id!r} has no adapter: making it failed, or it was unloaded")
        return self.learner


def folder_name(run: str) -> str:
    """A run's id as a folder's name."""
    return run.replace(":", "-")


def check_checkpoint(name: object) -> str:
    """A checkpoint's name becomes a folder's.

    Raises:
        UserError: it cannot be one.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"a checkpoint's name has 1 to 128 letters, digits, '.', '_' and '-', and is not {name!r}"
        )
    return name


def write_whole(learner: Learner, folder: Path, *, optimizer: bool) -> int:
    """Write a checkpoint beside its place and rename it; returns its bytes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old"))
    for left in (stage, old):
        shutil.rmtree(left, ignore_errors=True)
    files.write(learner, stage, optimizer=optimizer)
    if folder.exists():
        folder.rename(old)
    stage.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.iterdir())
