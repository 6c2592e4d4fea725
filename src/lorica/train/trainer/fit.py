"""Training from encoded rows to the end, of any model, whichever of its parameters train."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.trainer_callback import TrainerState

from lorica.errors import ConfigError, listing, nearest
from lorica.reading import read_object
from lorica.train.console import make_console, quiet, silent
from lorica.train.distributed.group import OfAll, by_first, is_first, wait_for_all
from lorica.train.generation.writing import Writer
from lorica.train.settings import TrainingConfig
from lorica.train.tasks import Task
from lorica.train.tasks.base import own_loss
from lorica.train.trainer.arguments import training_arguments, with_defaults
from lorica.train.trainer.callbacks import (
    CheckpointCallback,
    ProgressCallback,
    interruptible,
)
from lorica.train.trainer.checkpoints import (
    STATE,
    check_state,
    discard_incomplete,
    find_best,
    last_checkpoint,
)
from lorica.train.trainer.scoring import Scoring, majority
from lorica.train.trainer.trainer import Trainer, arguments_of, trainer_of


class Interrupted(OfAll):
    """The user stopped a run; a checkpoint was written, from which it can be resumed.

    Attributes:
        checkpoint: the checkpoint's folder, or None when there was not a step to keep.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        """Say where the checkpoint is."""
        self.checkpoint = checkpoint
        super().__init__(
            "interrupted before the first step" if checkpoint is None else f"interrupted; saved {checkpoint}"
        )


@dataclass(frozen=True)
class Fit:
    """A trained model, and how its training went.

    Args:
        model: the model, with its best weights if `load_best` was asked for and there were validation rows,
            else its last.
        trainer: the trainer, for more of it.
        steps: optimizer steps of the whole run, those before a resume included.
        seconds: duration of this call's training.
        step_seconds: median seconds per step, or None when this call made none.
        history: the log, one dictionary per entry.
        scoring: the metrics of the last evaluation.
    """

    model: PreTrainedModel
    trainer: Trainer
    steps: int
    seconds: float
    step_seconds: float | None
    history: list[dict[str, float]]
    scoring: Scoring

    def doubts(self) -> Iterator[str]:
        """Signs in the course of the loss that training diverged."""
        what = "take a lower learning_rate, or a longer warmup_ratio"
        names = ("loss", "eval_loss") if self.trainer.args.fp16 else ("loss", "eval_loss", "grad_norm")
        if any(not math.isfinite(entry[name]) for entry in self.history for name in names if name in entry):
            yield f"the loss or its gradient was not a number at times: training diverged; {what}"
            return
        losses = [entry["loss"] for entry in self.history if "loss" in entry]
        part = max(1, len(losses) // 5)
        first, last = (statistics.fmean(some) for some in (losses[:part] or [0.0], losses[-part:] or [0.0]))
        if self.trainer.loss_falls and len(losses) >= 4 and last > 1.5 * first:
            yield f"the training loss rose from {first:.4f} to {last:.4f}: training diverged; {what}"

    def all_the_same(self, split: str, rows: int) -> Iterator[str]:
        """A warning where the last evaluation called all rows the same."""
        if self.scoring.only is not None:
            yield (
                f"all {rows:,} {split} rows are called {self.scoring.only!r}: the model has not learned to "
                "tell the classes apart; give it more epochs or rows, or another learning_rate"
            )

    def evaluate(self, rows: Dataset) -> dict[str, float]:
        """Score the model on encoded rows: the task's metrics, and the loss."""
        return score(self.trainer, rows)

    def evaluated_last(self, rows: Dataset) -> dict[str, float] | None:
        """The scores of the evaluation after the last step, if it was of all these rows and of this model."""
        state, args, writer = self.trainer.state, self.trainer.args, self.trainer.writer
        reloaded = args.load_best_model_at_end and state.best_global_step != state.global_step
        if rows is not self.trainer.eval_dataset or reloaded or (writer and writer.config.eval_rows):
            return None
        for entry in reversed(state.log_history):
            if entry["step"] == state.global_step and "eval_loss" in entry:
                return logged_scores(entry, "eval_")
        return None


def fit(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    training: TrainingConfig,
    directory: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    title: str = "train",
    callbacks: list[TrainerCallback] | None = None,
    make_trainer: Callable[..., Trainer] | None = None,
    hear_interrupts: bool = True,
    writer: Writer | None = None,
) -> Fit:
    """Train the parameters that require a gradient: an adapter, a head, or everything.

    The same configuration, seed and rows give the same weights, bit for bit on a CPU, also when the run was
    killed at any moment and resumed, in as many processes.

    Args:
        model: the model; parameters that should not train are frozen already.
        task: the task.
        tokenizer: its tokenizer.
        train: encoded rows to learn from.
        validation: encoded rows that choose the best checkpoint, or None.
        training: how to train. What it leaves open is chosen by `lorica.train.trainer.arguments`.
        directory: folder for ``checkpoints/`` and ``tensorboard/``.
        resume: continue from the newest complete checkpoint, or start if there is none.
        console: where to show progress. None makes one.
        title: its name there.
        callbacks: more callbacks.
        make_trainer: makes the trainer, of `Trainer`'s arguments. None takes the task's own.
        hear_interrupts: let Ctrl-C end training with a checkpoint. False leaves signals to the caller.
        writer: writes and scores texts in each evaluation. None leaves loss and the task's metrics.

    Returns:
        The trained model and figures of the run.

    Raises:
        Interrupted: the user pressed Ctrl-C; a checkpoint was written.
        ConfigError: the configuration cannot be used on this device or with these rows.
    """
    console = console or make_console() if is_first() else silent()
    directory = Path(directory)
    checkpoints = (directory / "checkpoints").resolve()
    training = with_defaults(training, len(train) * task.copies, model, task)
    scoring = Scoring(task, model)
    deciding = (training.metric_for_best or task.best_metric).removeprefix("eval_")
    beats = {} if validation is None else majority(task, model, train, validation)
    progress = ProgressCallback(console, title, deciding, scoring, beats.get(deciding))
    saving = CheckpointCallback(training.save_steps)
    args = training_arguments(
        training,
        checkpoints,
        task.best_metric,
        validated=validation is not None,
        make=lambda values: arguments_of(task, values, train.column_names, training.max_length),
    )
    args.prediction_loss_only = args.prediction_loss_only or not task.reads_outputs
    with quiet():
        extra: list[TrainerCallback] = [saving, progress, *(callbacks or [])]
        if training.early_stopping_patience is not None:
            extra.append(EarlyStoppingCallback(training.early_stopping_patience))
        if "tensorboard" in training.report_to and is_first():
            extra.append(_tensorboard(directory / "tensorboard"))
        trainer = (make_trainer or trainer_of(task, training.seed))(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=task.collator(tokenizer),
            score=scoring,
            loss=own_loss(task),
            callbacks=extra,
            loraplus_lr_ratio=training.loraplus_lr_ratio,
            chunked_loss=training.chunked_loss,
            writer=writer,
        )
        trainer.remove_callback(PrinterCallback)
        start = None
        if resume:
            start = by_first(lambda: _start_in(checkpoints))
        if start is None and validation is not None and make_trainer is None:
            _check_metric(trainer, validation, task)
        began = time.perf_counter()
        try:
            with interruptible(saving, console) if hear_interrupts else contextlib.nullcontext():
                _run(trainer, start, training)
        finally:
            progress.close()
    wait_for_all()  # for the first, which writes
    if saving.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(last_checkpoint(checkpoints))
    return Fit(
        model,
        trainer,
        trainer.state.global_step,
        time.perf_counter() - began,
        progress.median_step_seconds,
        list(trainer.state.log_history),
        scoring,
    )


def _start_in(checkpoints: Path) -> Path | None:
    """The checkpoint to go on from; the rest of an interrupted save is deleted."""
    discard_incomplete(checkpoints)
    start = last_checkpoint(checkpoints)
    if start is not None:
        check_state(start)
        find_best(start)
    return start


def _check_metric(trainer: Trainer, validation: Dataset, task: Task) -> None:
    """Refuse a metric for the best checkpoint that an evaluation would not give, before the first epoch.

    Raises:
        ConfigError: there is no such metric.
    """
    metric = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric in ("loss", task.best_metric):
        return
    found: dict[str, float] = {}
    with torch.random.fork_rng():  # the run's own numbers stay as they were
        # A few rows show it; some metrics need rows of every class.
        for count in (min(trainer.args.eval_batch_size, len(validation)), len(validation)):
            found = score(trainer, validation.select(range(count)))
            if metric in found:
                return
    raise ConfigError(
        f"training.metric_for_best is {metric!r}, which these validation rows do not "
        f"give{nearest(metric, found)}; they give: {listing(found)}"
    )


def score(trainer: Trainer, rows: Dataset) -> dict[str, float]:
    """Score a trainer's model on encoded rows: the task's metrics, and the loss."""
    with quiet():
        outcome = trainer.predict(rows, metric_key_prefix="x")  # type: ignore[arg-type]
    return logged_scores(outcome.metrics or {}, "x_")


def logged_scores(logged: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The scores that an evaluation logged under a prefix, such as ``"eval_"``."""
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {
        name.removeprefix(prefix): float(value) for name, value in logged.items() if name.startswith(prefix)
    }
    return {name: value for name, value in named.items() if name not in timing}


def _run(trainer: Trainer, start: Path | None, training: TrainingConfig) -> None:
    if start is not None and _ended(start, training):
        # Only what follows training was lost; the trainer would take a step past the end.
        trainer.state = TrainerState.load_from_json(str(start / STATE))
        trainer._load_from_checkpoint(str(start))
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        return
    with warnings.catch_warnings():
        # Stepping the schedule at once after a resume, before the optimizer's first step, is right.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer.train(resume_from_checkpoint=None if start is None else str(start))


def _ended(checkpoint: Path, training: TrainingConfig) -> bool:
    """Whether a checkpoint is the last of its run: all steps taken, or stopped early."""
    state = read_object(checkpoint / STATE)
    stopper = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    waited = stopper.get("attributes", {}).get("early_stopping_patience_counter", 0)
    patience = training.early_stopping_patience
    return state["global_step"] >= state["max_steps"] or (patience is not None and waited >= patience)


def _tensorboard(directory: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(directory)))
