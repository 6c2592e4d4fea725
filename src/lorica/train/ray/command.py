"""``lorica train --launch.engine ray``: Ray is started or joined, and the first worker's lines are shown."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from rich.console import Console

from lorica.errors import LoricaError
from lorica.train.distributed.cluster import connected
from lorica.train.distributed.group import on_cpu
from lorica.train.ray.trainer import TorchTrainer
from lorica.train.recipe import Recipe
from lorica.train.run import Result
from lorica.train.settings import LaunchConfig
from lorica.train.system import writable_directory
from lorica.train.trainer.checkpoints import last_checkpoint
from lorica.train.trainer.fit import Interrupted


def train_on_ray(
    recipe: Recipe, *, config: LaunchConfig, console: Console, resume: bool, overwrite: bool, **options: Any
) -> Result:
    """Train a recipe by workers of Ray, on this machine or a cluster.

    Args:
        recipe: the run.
        config: how many workers, where, and how often lost ones are replaced.
        console: where to say what Ray has.
        resume: as in `train`.
        overwrite: as in `train`.
        options: more arguments of `train`.

    Returns:
        As `train`.

    Raises:
        LoricaError: Ray cannot be started or reached, the recipe cannot be trained, or the workers failed.
        Interrupted: the user pressed Ctrl-C.
    """
    assert config.processes is not None
    cpu = on_cpu() or bool(recipe.training.arguments.get("use_cpu"))
    cpus = max(1, (os.cpu_count() or 1) // config.processes) if config.address is None else 1
    output = Path(recipe.output).resolve()
    said = writable_directory(output / "checkpoints") / "ray.log"
    with connected(config.address, console.print), _shown(said, console):
        trainer = TorchTrainer(
            recipe.replace(output=str(output)),
            scaling_config=ScalingConfig(
                num_workers=config.processes,
                use_gpu=not cpu,
                resources_per_worker={"CPU": cpus} if cpu else None,
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(output / "checkpoints"),
                failure_config=FailureConfig(max_failures=config.retries),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
            resume=resume,
            overwrite=overwrite,
            options=options,
            said=said,
        )
        shutil.rmtree(output / "checkpoints" / "ray", ignore_errors=True)  # of an earlier call
        try:
            found = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise LoricaError(f"the workers of Ray failed: {error}") from error
        except (SystemExit, KeyboardInterrupt):  # what Ray makes of Ctrl-C
            raise Interrupted(last_checkpoint(output / "checkpoints")) from None
        shutil.rmtree(output / "checkpoints" / "ray", ignore_errors=True)  # it is in the output folder
    return found.return_value


@contextlib.contextmanager
def _shown(said: Path, console: Console) -> Iterator[None]:
    """Print what comes into a file, while the block lasts; then it is removed."""
    said.write_text("")
    ended = threading.Event()

    def follow() -> None:
        with said.open() as file:
            while True:
                last = ended.is_set()
                for line in file:
                    console.print(line.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
                if last:
                    return
                ended.wait(0.5)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        said.unlink(missing_ok=True)
