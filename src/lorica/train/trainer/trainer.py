"""lorica's Trainer: transformers' own, with a step, evaluation and checkpoints that read from top to bottom.

    a step        for each micro-batch: forward ──▶ logits not computed yet ──▶ loss ──▶ backward
                  then clipping, optimizer and schedule
    its loss      the mean over the target tokens of all the step's micro-batches
    evaluation    rows by length, outputs beside their rows; the loss over all targets; the model's texts
    a checkpoint  the adapter, the optimizer, random states; no secrets, and damage is named
    processes     several read together what one would, each row once; see `lorica.train.distributed`

The rest is in `mixin`, or, such as the loop over epochs, as transformers has it.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother, find_batch_size
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from lorica.methods.inserted import noted_labels
from lorica.train.distributed.batches import (
    SHARE,
    can_split,
    check_all_used,
    put_together,
    split_over,
    without_targets,
)
from lorica.train.distributed.group import check_world
from lorica.train.generation.writing import Writer
from lorica.train.tasks import Task
from lorica.train.trainer.deferred import deferred_logits
from lorica.train.trainer.loss import (
    SmoothedLoss,
    ignores_count,
    is_language_model,
    output_head,
    part_of_step,
    shifts_labels,
    targets_in,
    why_whole,
)
from lorica.train.trainer.mixin import RunTrainerMixin
from lorica.train.trainer.scoring import Score, back_in_order, scored

logger = logging.getLogger(__name__)


class Trainer(RunTrainerMixin, transformers.Trainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' Trainer, with adapter checkpoints, LoRA+ and an order of rows that a resume keeps.

    The loss of a language model is averaged over the target tokens of all the batches of a step, or of all
    rows in evaluation, and computed without the matrix of logits.

    - A step is all the micro-batches that gradient accumulation gathers: four of them give the gradient of
      one batch four times as large, whatever each holds of targets. transformers' Trainer does so for models
      that name their loss as it expects; here the others are right as well: those without a known name
      (GPT-2), for which it counts a target too many in each row, and those with a loss of their own (BART,
      T5, BERT's classifiers), for which it adds up the micro-batches' means.
    - The logits of all tokens never exist at once where the model has one head that ends in cross-entropy;
      see `deferred`. Where it has not, or the trainer shards or compiles the model, a line of log says so.
    - Evaluation reads rows longest first where a column says how long they are, which saves padding; outputs
      stand beside their rows all the same. Where only the loss is computed, its exponential is reported
      beside it as ``perplexity``.
    - Log entries with a training loss also hold ``peak_memory_gb`` and the speed: ``tokens_per_second``,
      padding left out, or ``samples_per_second`` where the model reads no tokens.

    Args:
        *args: as transformers' Trainer takes them.
        loss: function of the model's outputs and its inputs that returns a batch's mean loss, or None for
            the model's own; such as a task's.
        chunked_loss: False computes all logits at once.
        loraplus_lr_ratio: learning rate of B over that of A; see `parameter_groups`. None trains both at one
            rate.
        score: function of the outputs and the encoded rows, with all their columns, that returns metrics.
        writer: adds to each evaluation the scores of the model's texts. None leaves evaluation as it is.
        **options: as transformers' Trainer takes them.
    """

    def __init__(
        self,
        *args: Any,
        loss: Callable[[Any, Mapping[str, Any]], Tensor | None] | None = None,
        chunked_loss: bool = True,
        loraplus_lr_ratio: float | None = None,
        score: Score | None = None,
        writer: Writer | None = None,
        **options: Any,
    ) -> None:
        """Look at how the model computes its loss; leave the rest to transformers."""
        self.loss, self.chunked_loss, self.writer = loss, chunked_loss, writer
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._rows: Any = None
        """The rows that are evaluated."""
        self._order: list[int] | None = None
        """The places of these rows in the order in which they are read; None is their own."""
        self._sums: list[Tensor] = []
        """Of each batch that was evaluated: the sum of its targets' losses, and their number."""
        if score is not None:
            options["compute_metrics"] = lambda outcome: scored(score, self._beside_rows(outcome), self._rows)
        super().__init__(*args, **options)
        # Asked for checkpoints, transformers refuses a model that says so itself; ours have what is missing.
        self.is_distributed_loading_by_transformers |= self._in_parts(self.model)
        check_world(self.args.world_size)
        self._splits = self.args.world_size > 1 and can_split(self.accelerator)
        self._counted = 0
        """This process's own rows of the batch that is evaluated."""
        if self.args.process_index:  # no two processes drop the same
            torch.manual_seed(self.args.seed + self.args.process_index)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._mean_of_batch = self.model_accepts_loss_kwargs and ignores_count(model)
        self._loss_shifts_labels = not self._mean_of_batch and (
            self._loss_shifts_labels or shifts_labels(model)
        )
        self._head = self._find_head(model) if chunked_loss else None
        smoother = self.label_smoother
        if self._head is not None and isinstance(smoother, LabelSmoother):
            self.label_smoother = SmoothedLoss(smoother.epsilon, smoother.ignore_index)

    # A step of training: forward, loss, backward.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradients of a micro-batch.

        Args:
            model: the model.
            inputs: the micro-batch, labels included.
            num_items_in_batch: targets in all micro-batches of the step, where the loss is told them.

        Returns:
            Its loss, a scalar.
        """
        first = self._clock is None
        with self._deferred():
            # On the right device and in the right dtype: `compute_loss` below, then backward.
            loss = super().training_step(model, inputs, num_items_in_batch)
        if first and self.args.world_size > 1:
            check_all_used(model)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its part of the mean over the step's targets.

        Args:
            model: the model.
            inputs: the micro-batch, labels included.
            return_outputs: return the model's outputs beside it.
            num_items_in_batch: targets in all micro-batches of the step. None: the mean over this one.
        """
        labels, count, share = inputs.get("labels"), num_items_in_batch, inputs.pop(SHARE, 1.0)
        if self.args.label_smoothing_factor or self.compute_loss_func:
            # The labels are kept from the model, which would make the decoder's inputs of them.
            inputs = self._with_decoder_inputs(model, inputs)
            with noted_labels(model, labels):
                loss, outputs = super().compute_loss(model, inputs, True, count)
        elif self._mean_of_batch and labels is not None and count is not None:
            # Some of these models would divide by the number of targets, and some would not: none is told it.
            self.model_accepts_loss_kwargs = False
            try:
                loss, outputs = super().compute_loss(model, inputs, True)
            finally:
                self.model_accepts_loss_kwargs = True
            loss = self._part_of_step(loss, labels, count)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, count)
        if self.loss is not None and (own := self.loss(outputs, inputs)) is not None:
            labels = inputs.get("labels")
            loss = own if labels is None or count is None else self._part_of_step(own, labels, count)
        if share == 0.0 or (share != 1.0 and count is None):
            loss = loss * share
        return (loss, outputs) if return_outputs else loss

    def _part_of_step(self, loss: Tensor, labels: Tensor, count: Tensor | int) -> Tensor:
        """A micro-batch's part of the mean loss over the targets of its step."""
        copies = 1  # of the loss, where `count` is the number of targets on all devices
        if self.args.average_tokens_across_devices:
            copies = self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu
        return part_of_step(loss, targets_in(labels, shifted=self._loss_shifts_labels), count, copies)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if self._splits:
            batch_samples = [without_targets(batch) for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _with_decoder_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        bare: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        shift = getattr(bare, "prepare_decoder_input_ids_from_labels", None)
        if shift is None or inputs.get("labels") is None or "decoder_input_ids" in inputs:
            return inputs
        return {**inputs, "decoder_input_ids": shift(labels=inputs["labels"])}

    @contextmanager
    def _deferred(self, wanted: bool = True) -> Iterator[None]:
        """Within it, the model's head answers with logits that its loss computes a few tokens at a time."""
        if self._head is None or not wanted:
            yield
            return
        with deferred_logits(self._head, on_whole=self._give_up):
            yield

    def _give_up(self, reason: str) -> None:
        if self._head is not None:
            self._head = None
            self._say_whole(f"they are used in {reason}")

    def _find_head(self, model: nn.Module) -> nn.Module | None:
        head = output_head(model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        # Once the model's forward pass has ended, the head's weight is in parts again.
        outside = self.loss is not None or self.compute_loss_func or self.args.label_smoothing_factor
        reason = why_whole(head, self.args, sharded=sharded or bool(outside and self._in_parts(model)))
        if reason is None:
            return head
        if head is not None or is_language_model(model):
            self._say_whole(reason, model)
        return None

    def _say_whole(self, reason: str, model: Any = None) -> None:
        named: Any = self.model if model is None else model
        name = named._get_name()
        logger.warning("%s: the loss is computed from all logits at once, because %s", name, reason)

    # Several processes.

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        if self.args.ddp_find_unused_parameters is None:
            # Looking for them copies the outputs, and with them the logits.
            self.args.ddp_find_unused_parameters = False
        return super()._build_accelerator_args(**options)

    def _get_dataloader(self, dataset: Any, *args: Any, **options: Any) -> Any:
        if not self._splits or isinstance(dataset, torch.utils.data.IterableDataset):
            return super()._get_dataloader(dataset, *args, **options)
        with split_over(self.accelerator):
            return super()._get_dataloader(dataset, *args, **options)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens(without_targets(inputs) if self._splits else inputs)

    def _put_together(self, part: Any) -> Any:
        return put_together(part, self._counted)

    # Evaluation.

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluate on rows; see transformers' Trainer."""
        self._look_at(self.eval_dataset if eval_dataset is None else eval_dataset)
        return super().evaluate(eval_dataset, *args, **options)

    def predict(self, test_dataset: Any, *args: Any, **options: Any) -> Any:
        """Predict for rows; see transformers' Trainer."""
        self._look_at(test_dataset)
        return super().predict(test_dataset, *args, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Read all rows, take the mean loss over all their targets, and score the model's texts."""
        self._sums = []
        if self._splits:
            self.gather_function = self._put_together
        found = super().evaluation_loop(*args, **options)
        if found.metrics is not None:
            if self._sums:
                self._take_mean(found.metrics)
            if self.writer is not None:
                model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
                few = self.writer.config.eval_rows if self.is_in_train else None
                prefix = options.get("metric_key_prefix", "eval")
                scores = self.writer.score(model, self._rows, few)
                found.metrics.update({f"{prefix}_{name}": score for name, score in scores.items()})
        self._sums = []
        return found._replace(
            predictions=back_in_order(found.predictions, self._order),
            label_ids=back_in_order(found.label_ids, self._order),
        )

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **options: Any
    ) -> Any:
        """Evaluate a batch, and count its targets; where only its loss matters, it is computed in chunks."""
        whole = inputs.pop(SHARE, 1.0) > 0
        self._counted = (find_batch_size(inputs) or 0) if whole else 0
        across = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False  # this batch's mean
        try:
            with self._deferred(prediction_loss_only):
                found = super().prediction_step(model, inputs, prediction_loss_only, *args, **options)
        finally:
            self.args.average_tokens_across_devices = across
        loss, labels = found[0], inputs.get("labels")
        of_tokens = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
        if loss is not None and of_tokens:
            count = (
                targets_in(labels, shifted=self._loss_shifts_labels).to(loss.device, torch.float64) * whole
            )
            self._sums.append(torch.stack([loss.double() * count if count else count, count]))
        return found

    def _take_mean(self, metrics: dict[str, float]) -> None:
        """Put the mean over all targets in place of the mean over rows, which moves with the batch size."""
        own = torch.stack(self._sums).sum(0)
        gathered = self.accelerator.gather(own.to(self.args.device).unsqueeze(0))
        assert isinstance(gathered, Tensor)
        total, count = gathered.sum(0)
        loss = float(total / count) if count else math.nan
        name = next((key for key in metrics if key.endswith("_loss")), None)
        if name is not None:
            metrics[name] = loss
            if self.args.prediction_loss_only:
                # Past 700 the exponential has no float.
                metrics[name.removesuffix("loss") + "perplexity"] = math.exp(min(loss, 700.0))

    def _look_at(self, rows: Any) -> None:
        """Keep the rows, and the order in which they are read if that is not their own."""
        self._rows, self._order = rows, None
        column = self.args.length_column_name
        if self._orders and column in getattr(rows, "column_names", ()):
            lengths = rows[column][:]
            self._order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        # transformers' own order by length is drawn at random, so outputs could not be put beside their rows.
        if not self._orders:
            return None
        own = torch.utils.data.SequentialSampler(eval_dataset)
        return own if self._order is None else cast(torch.utils.data.Sampler, self._order)

    def _beside_rows(self, outcome: EvalPrediction) -> EvalPrediction:
        """Outputs and labels in the rows' own order."""
        parts = (outcome.predictions, outcome.label_ids, outcome.inputs, outcome.losses)
        return EvalPrediction(*(back_in_order(part, self._order) for part in parts))


def trainer_of(task: Task, seed: int = 0) -> Callable[..., Any]:
    """A function of the arguments of `Trainer` that makes a task's trainer: that class, as a rule.

    Args:
        task: what is learned, settled.
        seed: of what such a trainer draws before it starts.

    Raises:
        MissingExtra: that library is not installed.
    """
    return Trainer if task.carrier is None else _carrier(task).trainer_of(task, seed)


def arguments_of(
    task: Task, values: dict[str, Any], columns: list[str], max_length: int
) -> transformers.TrainingArguments:
    """The arguments of a task's trainer.

    Args:
        task: what is learned, settled.
        values: fields of transformers' TrainingArguments.
        columns: those of the encoded rows.
        max_length: tokens kept of a row.

    Raises:
        ConfigError: the recipe says what the library that carries the task refuses.
    """
    if task.carrier is None:
        return transformers.TrainingArguments(**values)
    return _carrier(task).arguments_of(task, values, columns, max_length)


def _carrier(task: Task) -> Any:
    assert task.carrier is not None
    return importlib.import_module(task.carrier)
