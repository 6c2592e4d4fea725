"""A recipe trained by Ray Train: its workers on a cluster, started again where one is lost.

    TorchTrainer(recipe, scaling_config=ScalingConfig(num_workers=2)).fit()

Each worker is one of the processes of a run, as under torchrun: the same group, the same steps, the same
bits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import ray.train
import ray.train.torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica.errors import LoricaError
from lorica.train.data.splits import Rows
from lorica.train.distributed.cluster import connected
from lorica.train.distributed.group import Lost, is_first, on_cpu, wait_for_all
from lorica.train.recipe import Recipe
from lorica.train.run import Result, make_room, train
from lorica.train.settings import LaunchConfig
from lorica.train.system import alone_in, writable_directory
from lorica.train.trainer.checkpoints import last_checkpoint
from lorica.train.trainer.fit import Interrupted


class TorchTrainer(ray.train.torch.TorchTrainer):
    """Ray Train's trainer, for a recipe in place of a training function.

    Every checkpoint of the run is reported to Ray with the figures of its step, and after the last the
    adapter: ``fit().checkpoint`` is its folder, ``fit().metrics`` its scores, ``fit().return_value`` the
    run's `lorica.train.Result`. A worker that is lost ends the others; Ray starts all again, as often as
    ``RunConfig(failure_config=FailureConfig(max_failures=...))`` says, and the run goes on from its last
    checkpoint, bit for bit on CPUs.

    Args:
        recipe: the run. Its output folder is one that the driver and all workers reach; a relative one is
            taken from `run_config.storage_path`, if that is a folder, else from here.
        rows: rows in memory, in place of those that the recipe names, as in `lorica.train.train`.
        scaling_config: workers, and the resources of each.
        run_config: storage, retries, callbacks of Ray's.
        resume: go on from the newest checkpoint in the output folder, or start if there is none.
        overwrite: replace the run in the output folder.
        options: more arguments of `lorica.train.train`.
        said: file for what the first worker would print. None prints it, among what Ray passes on.
        others: more arguments of Ray's `TorchTrainer`, such as ``torch_config``.
    """

    def __init__(
        self,
        recipe: Recipe,
        rows: Rows | None = None,
        *,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        resume: bool = False,
        overwrite: bool = False,
        options: Mapping[str, Any] | None = None,
        said: Path | None = None,
        **others: Any,
    ) -> None:
        storage = None if run_config is None else run_config.storage_path
        here = Path.cwd() if storage is None or "://" in str(storage) else Path(storage)
        self.recipe = recipe.replace(output=str(here / recipe.output))
        self._resume, self._overwrite = resume, overwrite
        work = {
            "recipe": self.recipe,
            "rows": rows,
            "folder": str(Path.cwd()),
            "options": dict(options or {}),
            "said": said,
        }
        super().__init__(
            _work, train_loop_config=work, scaling_config=scaling_config, run_config=run_config, **others
        )

    def fit(self) -> Any:
        """Train, and wait for the end.

        Returns:
            Ray's `Result`.

        Raises:
            LoricaError: the output folder holds a run, and neither `resume` nor `overwrite` was said; or the
                recipe cannot be trained, which is not tried again.
            ray.train.TrainingFailedError: the workers failed more often than was allowed.
        """
        # Once, here: workers that are started again find a run that goes on.
        with alone_in(self.recipe.output) as output:
            make_room(output, resume=self._resume, overwrite=self._overwrite)
        found = super().fit()
        if isinstance(found.return_value, str):
            raise LoricaError(found.return_value)
        return found


def _work(given: dict[str, Any]) -> Result | str:
    """What each worker does.

    Returns:
        What the run came to, or why it cannot be done: Ray would try again after an error.
    """
    if Path(given["folder"]).is_dir():
        os.chdir(given["folder"])  # Ray begins in a folder of its own, and a recipe's paths are the user's
    with contextlib.ExitStack() as stack:
        console = None
        if given["said"] is not None and is_first():
            console = Console(file=stack.enter_context(given["said"].open("a", buffering=1)), width=200)
        try:
            result = train(
                given["recipe"],
                given["rows"],
                resume=True,
                console=console,
                callbacks=[Reporting()],
                **given["options"],
            )
        except Lost:
            raise
        except LoricaError as error:
            return str(error)
    scores = {
        f"{split}_{name}": value for split, own in result.metrics.items() for name, value in own.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        if is_first():
            for file in Path(result.output).iterdir():
                if file.is_file():
                    shutil.copy2(file, folder)
        ray.train.report(scores, Checkpoint.from_directory(folder) if is_first() else None)
    return result


class Reporting(TrainerCallback):
    """Reports each checkpoint to Ray, with what was logged last."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report it once every worker has written its part."""
        wait_for_all()
        seen: dict[str, Any] = {}
        for entry in state.log_history:
            seen.update(entry)
        metrics = {**seen, "step": state.global_step, "epoch": state.epoch}
        folder = Path(cast("str", args.output_dir)) / f"checkpoint-{state.global_step}"
        ray.train.report(metrics, Checkpoint.from_directory(folder) if is_first() else None)


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
