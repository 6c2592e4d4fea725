"""Cross-entropy over a vocabulary, without the matrix of logits.

               plain                                   in chunks
    hidden ──▶ head ──▶ logits, tokens × 50,000        drop the tokens that are no targets, then for each 256:
    (kept)              log-softmax, the same          head ──▶ logits ──▶ loss ──▶ gradient of hidden
                        their gradient, the same       and the logits are gone

A scalar loss has one number come back to it, so its gradient can be formed before that number is known and
multiplied by it later. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
        hidden: what the head reads.
        target: class of each row, or `ignore_index`.
        parameters: what `head` reads besides and whose gradient is wanted; others of it get none. A
            `LinearHead` brings its own.
        after: what becomes of logits before their loss, such as softcapping; each row by itself.
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
