"""A function in several workers of Ray Train, as `lorica.train.distributed.launch` calls one in processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig


def in_workers(
    work: Callable[..., int],
    args: Sequence[Any],
    *,
    processes: int,
    resources: Mapping[str, float],
    storage: Path,
) -> int:
    """Call a function in several workers that form a group, and wait for all of them.

    Args:
        work: a function at the top of a module, which returns an exit status.
        args: its arguments.
        processes: how many workers.
        resources: of each, by Ray's names; with a GPU they compute on it.
        storage: folder in which Ray has one of its own meanwhile, reachable from every machine.

    Returns:
        0, or 1 where one failed or was lost; then the others are ended.
    """
    shutil.rmtree(storage / "ray", ignore_errors=True)  # of an earlier call
    trainer = ray.train.torch.TorchTrainer(
        _call,
        train_loop_config={"work": work, "args": tuple(args), "folder": str(Path.cwd())},
        scaling_config=ScalingConfig(
            num_workers=processes,
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker=dict(resources),
        ),
        run_config=RunConfig(
            name="ray", storage_path=str(storage), failure_config=FailureConfig(max_failures=0)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError:
        return 1
    finally:
        shutil.rmtree(storage / "ray", ignore_errors=True)
    return 0


def _call(given: dict[str, Any]) -> None:
    if Path(given["folder"]).is_dir():
        os.chdir(given["folder"])  # Ray begins in a folder of its own, and a recipe's paths are the user's
    code = given["work"](*given["args"])
    if code:
        raise RuntimeError(f"it ended with status {code}")  # for Ray, which ends the other workers
