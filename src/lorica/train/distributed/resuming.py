"""Going on with a run in another number of processes than it had: refused, or asked for and made exact."""

from __future__ import annotations

import re
from pathlib import Path

from lorica.errors import ConfigError
from lorica.train.distributed.group import world
from lorica.train.settings import TrainingConfig

PER_PROCESS = ("training.batch_size", "training.eval_batch_size")
"""Fields of a recipe that say how much each process does at once."""


def processes_of(checkpoint: Path) -> int | None:
    """Number of processes that wrote a checkpoint, by their random states. None where there are none."""
    names = [path.name for path in checkpoint.glob("rng_state*.pth")]
    several = [name for name in names if re.fullmatch(r"rng_state_\d+\.pth", name)]
    return len(several) or (1 if names else None)


def check_processes(checkpoint: Path, *, changed: bool) -> int | None:
    """Refuse to go on in another number of processes, unless that was asked for.

    Args:
        checkpoint: to go on from.
        changed: whether it was asked for.

    Returns:
        How many processes wrote it; None where that cannot be told.

    Raises:
        ConfigError: naming both numbers.
    """
    before, now = processes_of(checkpoint), world()
    if before is None or before == now or changed:
        return before
    raise ConfigError(
        f"{checkpoint} was written by {before} process{'es' if before > 1 else ''}, and this run has {now}; "
        f"resume it with --launch.processes {before}, or say --changed_processes and give a "
        "training.batch_size that makes as many rows a step"
    )


def check_rows_a_step(before: TrainingConfig, now: TrainingConfig, processes: int) -> None:
    """Refuse other rows in a step than those of the run that goes on.

    Args:
        before: how it trained.
        now: how it is to go on.
        processes: how many it had.

    Raises:
        ConfigError: naming both numbers, and what batch size is needed.
    """
    wanted, given = before.batch_size * processes, now.batch_size * world()
    if wanted == given:
        return
    fits = (
        f"give training.batch_size {wanted // world()}"
        if wanted % world() == 0
        else (f"{wanted} rows cannot be split over {world()} processes")
    )
    raise ConfigError(
        f"a batch of the run was {wanted} rows ({processes} × {before.batch_size}), and would be {given} now "
        f"({world()} × {now.batch_size}); {fits}"
    )
