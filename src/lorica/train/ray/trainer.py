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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray.train
import ray.train.torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica.errors import LoricaError
from lorica.train.data.splits import Rows
from lorica.train.distributed.group import Lost, is_first, wait_for_all
from lorica.train.recipe import Recipe
from lorica.train.run import Result, make_room, train
from lorica.train.system import alone_in


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
    """The work of each worker.

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
