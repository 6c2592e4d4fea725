"""The loss of a step: the mean over its targets, and cross-entropy without the matrix of logits.

               plain                                   in chunks
    hidden ──▶ head ──▶ logits, tokens × 50,000        drop the tokens that are no targets, then for each 256:
    (kept)              log-softmax, the same          head ──▶ logits ──▶ loss ──▶ gradient of hidden
                        their gradient, the same       and the logits are gone

A scalar loss has one number come back to it, so its gradient can be formed before that number is known and
multiplied by it later. Nothing is computed twice.

Some models take the mean over a micro-batch, others are told the number of targets in the step; the functions
below tell which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

from lorica._shapes import Float, Int
from lorica.errors import ConfigError, StateError

CHUNK = 256
"""Tokens whose logits exist at once: enough rows for a product at full speed, an eighth of 2,048."""


class LinearHead(NamedTuple):
    """A linear head, whose gradients can be added where they belong without a copy for each chunk.

    Args:
        weight: (classes, width).
        bias: (classes,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The logits of some rows."""
        return F.linear(x, self.weight, self.bias)


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "tokens width"],
    target: Int[Tensor, " tokens"],
    parameters: Sequence[Tensor] = (),
    *,
    after: Callable[[Tensor], Tensor] = lambda logits: logits,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk: int = CHUNK,
) -> Float[Tensor, ""]:
    """The cross-entropy of ``head(hidden)``, with the logits of few tokens at a time.

    Loss and gradients equal those of ``F.cross_entropy(after(head(hidden)), target)``. The loss is summed in
    float32 or better; the gradient of a half-precision parameter of the head is rounded once a chunk.
    Gradients can be taken again (``retain_graph``).

    Args:
        head: makes logits (n, classes) of rows (n, width), each row by itself. One that trains takes
            least memory as a `LinearHead`.
        hidden: the head's input.
        target: class of each row, or `ignore_index`.
        parameters: what `head` reads besides and whose gradient is wanted; others of it get none. A
            `LinearHead` brings its own.
        after: operation on logits before their loss, such as softcapping; each row by itself.
        ignore_index: target of rows that do not count. The head never sees them.
        reduction: "sum", or "mean" over the rows that count (nan where none does).
        label_smoothing: share of the target's probability spread over all classes, in [0, 1].
        chunk: rows whose logits exist at once.

    Returns:
        The loss, a scalar. Differentiating its gradients (``create_graph``) raises `StateError`.

    Raises:
        ConfigError: `reduction` is neither.
    """
    if reduction not in ("mean", "sum"):
        raise ConfigError(f'reduction must be "mean" or "sum", not {reduction!r}')
    kept = (target != ignore_index).nonzero().squeeze(1)
    if len(kept) < len(target):
        hidden, target = hidden.index_select(0, kept), target.index_select(0, kept)
    if isinstance(head, LinearHead):
        parameters = [p for p in head if p is not None]
    wanted = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or bool(wanted))
    loss: Tensor = _ChunkedCrossEntropy.apply(
        head, after, hidden, target, label_smoothing, chunk, differentiable, *wanted
    )
    return loss / len(kept) if reduction == "mean" else loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss; its gradients are formed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        after: Callable[[Tensor], Tensor],
        hidden: Tensor,
        target: Tensor,
        label_smoothing: float,
        chunk: int,
        differentiable: bool,
        *parameters: Tensor,
    ) -> Tensor:
        wants_hidden = differentiable and hidden.requires_grad
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_parameters: list[Tensor | None] = [None] * len(parameters)
        if isinstance(head, LinearHead) and parameters and not torch.is_autocast_enabled(hidden.device.type):
            sums = [torch.zeros_like(p) if p is not None and p.requires_grad else None for p in head]
            d_parameters = [total for total in sums if total is not None]
            head = partial(_AddingLinear.apply, *head, *sums)
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(differentiable):
                x = hidden[rows].detach().requires_grad_(wants_hidden)
                logits = after(head(x))
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                part = F.cross_entropy(logits, target[rows], reduction="sum", label_smoothing=label_smoothing)
            del logits
            loss += part.detach()
            if not differentiable:
                continue
            inputs = [x, *parameters] if wants_hidden else [*parameters]
            gradients = list(torch.autograd.grad(part, inputs, allow_unused=True))
            if d_hidden is not None:
                d_hidden[rows] = gradients.pop(0)
            d_parameters = [_sum(*pair) for pair in zip(d_parameters, gradients, strict=True)]
        ctx.empty = len(hidden) == 0
        if differentiable and ctx.empty:
            d_parameters = [torch.zeros_like(p) for p in parameters]
        ctx.save_for_backward(d_hidden, *d_parameters)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise StateError(
                "the chunked loss has no second derivative: its logits are gone; take the loss from "
                "F.cross_entropy(head(hidden), target), or pass chunked_loss=False to the Trainer"
            )
        if ctx.empty:
            # A mean over nothing sends back infinity, and no target asks for anything: torch's own loss has
            # gradients of zero here.
            d_loss = torch.zeros_like(d_loss)
        d_hidden, *d_parameters = (_scaled(d, d_loss) for d in ctx.saved_tensors)
        return None, None, d_hidden, None, None, None, None, *d_parameters


class _AddingLinear(torch.autograd.Function):
    """A linear layer that adds its parameters' gradients to `d_weight` and `d_bias`, where given."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums = d_weight, d_bias
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        d_weight, d_bias = ctx.sums
        if d_weight is not None:
            d_weight.addmm_(dy.t(), x)
        if d_bias is not None:
            d_bias.add_(dy.sum(0))
        return None, None, None, None, dy @ weight if ctx.needs_input_grad[4] else None


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return total
    # A copy: autograd may hand one tensor to two parameters.
    return gradient.clone() if total is None else total.add_(gradient)


def _scaled(gradient: Tensor | None, by: Tensor) -> Tensor | None:
    return None if gradient is None else gradient * by


def targets_in(labels: Tensor, *, shifted: bool) -> Tensor:
    """Number of targets among some labels.

    Args:
        labels: (..., tokens), -100 where there is nothing to learn.
        shifted: whether the model predicts the next token, which leaves no target in a row's first place.
    """
    return (labels[..., 1:] if shifted else labels).ne(-100).sum()


def part_of_step(loss: Tensor, targets: Tensor, count: Tensor | int, copies: int = 1) -> Tensor:
    """A micro-batch's part of the mean loss over the targets of a whole step.

    Args:
        loss: the micro-batch's own mean, a scalar.
        targets: number of its targets.
        count: number of the step's targets.
        copies: devices over which the result will be averaged, where `count` is over all of them.
    """
    return loss * (targets / count * copies)


def why_whole(head: nn.Module | None, args: transformers.TrainingArguments, *, sharded: bool) -> str | None:
    """Why a model's loss has to be computed from all its logits at once; None where it need not be.

    Args:
        head: the module that makes the logits, if one does.
        args: the trainer's.
        sharded: whether FSDP or DeepSpeed shards the model.
    """
    if head is None:
        return "it has not one head that makes them"
    if sharded:
        return "the head's weight is sharded"
    if args.n_gpu > 1:
        return "DataParallel copies the model"
    if args.world_size > 1 and args.ddp_find_unused_parameters:
        return "torch looks for parameters without a gradient in each step, which copies them"
    if args.torch_compile:
        return "the model is compiled"
    if args.use_liger_kernel:
        return "Liger's kernels compute it"
    if hasattr(head, "_hf_hook"):
        return "the head's weight is moved in and out by accelerate"
    if head._backward_hooks or head._backward_pre_hooks:
        return "the head has backward hooks"
    return None


def is_language_model(model: nn.Module) -> bool:
    """Whether transformers knows the model's class as one of causal language models."""
    return model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


class SmoothedLoss(LabelSmoother):
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


def output_head(model: nn.Module) -> nn.Module | None:
    """The module whose output is a model's logits, or None."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss is transformers' for causal language models, under any name."""
    if not _calls_loss_function(model) or getattr(model.config, "is_encoder_decoder", False):
        return False
    return model.loss_function is ForCausalLMLoss


def ignores_count(model: nn.Module) -> bool:
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
