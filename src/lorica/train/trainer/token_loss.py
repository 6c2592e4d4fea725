"""A trainer's loss of language models: averaged over target tokens, computed without the matrix of logits."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

from lorica.baselines.inserted import noted_labels
from lorica.train.trainer.deferred import deferred_logits

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


class TokenLossMixin(_Base):
    """Averages a loss over all targets of a step, and computes a language model's in chunks.

    A step is all the micro-batches that gradient accumulation gathers: four of them give the gradient of one
    batch four times as large, whatever each holds of targets. transformers' Trainer does so for models that
    name their loss as it expects; here the others are right as well: those without a known name (GPT-2), for
    which it counts a target too many in each row, and those with a loss of their own (BART, T5, BERT's
    classifiers), for which it adds up the micro-batches' means.

    The logits of all tokens never exist at once where the model has one head that ends in cross-entropy; see
    `deferred`. Where it has not, or the trainer shards or compiles the model, a line of log says so.

    Args:
        *args: as the trainer takes them.
        chunked_loss: False computes all logits at once.
        **options: as the trainer takes them.
    """

    def __init__(self, *args: Any, chunked_loss: bool = True, **options: Any) -> None:
        """Look at how the model computes its loss."""
        super().__init__(*args, **options)
        self.chunked_loss = chunked_loss
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._mean_of_batch = self.model_accepts_loss_kwargs and _ignores_count(model)
        self._loss_shifts_labels = not self._mean_of_batch and (
            self._loss_shifts_labels or _shifts_labels(model)
        )
        self._head = self._find_head(model) if chunked_loss else None
        smoother = self.label_smoother
        if self._head is not None and isinstance(smoother, LabelSmoother):
            self.label_smoother = _SmoothedLoss(smoother.epsilon, smoother.ignore_index)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """A step of training, its loss computed in chunks."""
        with self._deferred():
            return super().training_step(*args, **options)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **options: Any
    ) -> Any:
        """A step of evaluation; where only its loss matters, that is computed in chunks."""
        with self._deferred(prediction_loss_only):
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the mean over the step's targets."""
        labels = inputs.get("labels")
        other = self.args.label_smoothing_factor or self.compute_loss_func
        if other:
            bare: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            shift = getattr(bare, "prepare_decoder_input_ids_from_labels", None)
            if shift is not None and labels is not None and "decoder_input_ids" not in inputs:
                # The labels are kept from the model, which would make the decoder's inputs of them.
                inputs = {**inputs, "decoder_input_ids": shift(labels=labels)}
            with noted_labels(model, labels):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._mean_of_batch or labels is None or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Some of these models would divide by the number of targets, and some would not: none is told it.
        self.model_accepts_loss_kwargs = False
        try:
            found = super().compute_loss(model, inputs, return_outputs)
        finally:
            self.model_accepts_loss_kwargs = True
        share = self._share(labels, num_items_in_batch)
        return (found[0] * share, found[1]) if return_outputs else found * share

    def _share(self, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
        """A micro-batch's part of the step's targets: what its mean loss counts in the sum of all."""
        # A model that predicts the next token has no target in a row's first place.
        targets = labels[..., 1:] if self._loss_shifts_labels else labels
        return targets.ne(-100).sum() / num_items_in_batch * self._copies()

    def _copies(self) -> int:
        """By what a loss is multiplied that was divided by the targets of all processes."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu

    @contextmanager
    def _deferred(self, wanted: bool = True) -> Iterator[None]:
        if self._head is None or not wanted:
            yield
            return
        with deferred_logits(self._head, on_whole=self._give_up):
            yield

    def _give_up(self, reason: str) -> None:
        if self._head is not None:
            self._head = None
            logger.warning(
                "%s: the loss is computed from all logits at once, because they are used in %s",
                type(self.model).__name__,
                reason,
            )

    def _find_head(self, model: nn.Module) -> nn.Module | None:
        head = _output_head(model)
        reason = self._why_whole(head)
        if reason is None:
            return head
        if head is not None or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            logger.warning(
                "%s: the loss is computed from all logits at once, because %s", type(model).__name__, reason
            )
        return None

    def _why_whole(self, head: nn.Module | None) -> str | None:
        if head is None:
            return "it has not one head that makes them"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "the head's weight is sharded"
        if self.args.n_gpu > 1:
            return "DataParallel copies the model"
        if self.args.torch_compile:
            return "the model is compiled"
        if self.args.use_liger_kernel:
            return "Liger's kernels compute it"
        if hasattr(head, "_hf_hook"):
            return "the head's weight is moved in and out by accelerate"
        if head._backward_hooks or head._backward_pre_hooks:
            return "the head has backward hooks"
        return None


class _SmoothedLoss(LabelSmoother):
    """transformers' smoothed loss, through ``F.cross_entropy`` and so in chunks."""

    def __call__(
        self, model_output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a model's outputs; see `LabelSmoother`."""
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        loss = F.cross_entropy(
            logits.float().view(-1, logits.shape[-1]),
            labels.view(-1),
            reduction="sum",
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
        )
        return loss / (
            labels.ne(self.ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        )


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss is transformers' for causal language models, under whatever name."""
    if not _calls_loss_function(model) or getattr(model.config, "is_encoder_decoder", False):
        return False
    return model.loss_function is ForCausalLMLoss


def _ignores_count(model: nn.Module) -> bool:
    """Whether the model is one of transformers' whose loss is the mean over the micro-batch, in any case.

    Some write out a loss of their own, which does not look at the number of targets that it is given. Those
    that share the loss of classes and numbers pass that number on to it, or do not.
    """
    if not inspect.unwrap(type(model).forward).__module__.startswith("transformers."):
        return False
    return not _calls_loss_function(model) or model.loss_function is ForSequenceClassificationLoss


def _calls_loss_function(model: nn.Module) -> bool:
    if not isinstance(model, transformers.PreTrainedModel):
        return False
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
