"""One pass over the base for the sequences of many calls: losses, and gradients where they belong.

    lanes ─▶ hidden ─▶ rows of 256 ─▶ logits ─▶ logp ─▶ loss ─▶ gradient of hidden ─▶ one backward pass
                       (and the logits are gone)

The loss of a token depends on its own log-probability alone, so its gradient is known as soon as that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorica.service.engine.base import Base, Read
from lorica.service.engine.datum import Datum
from lorica.service.engine.lanes import Lane, run
from lorica.service.engine.losses import Loss
from lorica.service.engine.weights import Weights

CHUNK = 256
"""Tokens whose logits exist at once."""


@dataclass(eq=False)
class Task:
    """A sequence to be learnt from, or only looked at.

    Args:
        datum: checked, by `Datum.ready`.
        loss: to be computed.
        settings: of the loss.
        weights: the adapter that acts; None for the base.

    Attributes:
        logprobs: of its targets (N, K), once it is done.
        loss_sum: of its tokens.
        error: what went wrong in its forward pass.
    """

    datum: Datum
    loss: Loss
    settings: dict[str, float]
    weights: Weights | None
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    loss_sum: float = 0.0
    error: Exception | None = None


@dataclass(eq=False)
class _Piece:
    """Some rows of one task."""

    task: Task
    read: Read
    rows: Tensor
    gradient: Tensor | None


def learn(base: Base, tasks: Sequence[Task], *, backward: bool) -> None:
    """Fill in the tasks, and add their gradients to their learners', task by task in their order.

    Args:
        base: the model.
        tasks: each with an adapter of its own, or several with one.
        backward: whether gradients are wanted.
    """
    with base.running(backward=backward):
        lanes = [Lane(task.weights, partial(_read, base, task)) for task in tasks]
        try:
            run(lanes)
        finally:
            for lane in lanes:
                lane.abandon()
    pieces: list[_Piece] = []
    hidden: list[tuple[Tensor, Tensor]] = []
    for task, lane in zip(tasks, lanes, strict=True):
        task.error = lane.error
        if lane.error is not None:
            continue
        read: Read = lane.result
        task.logprobs = torch.empty(task.datum.inputs["target_tokens"].shape)
        gradient = torch.zeros_like(read.hidden) if backward else None
        if gradient is not None:
            hidden.append((read.hidden, gradient))
        pieces += _pieces(task, read, gradient)
    for chunk in _chunks(pieces):
        _compute(base, chunk)
    if hidden:
        torch.autograd.backward([h for h, _ in hidden], [g for _, g in hidden])


def _read(base: Base, task: Task, lane: Lane) -> Any:
    return base.read(task.datum.tokens)


def _pieces(task: Task, read: Read, gradient: Tensor | None) -> Iterator[_Piece]:
    """At most `CHUNK` rows each; those that have no part in the gradient by themselves."""
    acting = torch.stack([task.datum.inputs[name] != 0 for name in task.loss.idle]).all(0).any(1)
    if gradient is None:
        acting = torch.zeros_like(acting)
    for rows, at in ((acting, gradient), (~acting, None)):
        for part in rows.nonzero().flatten().split(CHUNK):
            if len(part):
                yield _Piece(task, read, part, at)


def _chunks(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of at most `CHUNK` rows together, those with gradients first, in their order."""
    for wants in (True, False):
        chunk: list[_Piece] = []
        for piece in pieces:
            if (piece.gradient is not None) is not wants:
                continue
            if chunk and sum(len(p.rows) for p in chunk) + len(piece.rows) > CHUNK:
                yield chunk
                chunk = []
            chunk.append(piece)
        if chunk:
            yield chunk


def _compute(base: Base, chunk: Sequence[_Piece]) -> None:
    """Log-probabilities, losses and the gradient of hidden, of a chunk."""
    wants = chunk[0].gradient is not None
    xs = [piece.read.hidden.detach()[piece.rows].requires_grad_(wants) for piece in chunk]
    with torch.set_grad_enabled(wants):
        logits = base.logits([p.read for p in chunk], xs, [p.task.weights for p in chunk])
        logps = [_logp(piece, y) for piece, y in zip(chunk, logits, strict=True)]
    slopes = []
    for piece, logp in zip(chunk, logps, strict=True):
        task, rows = piece.task, piece.rows
        leaf = logp.detach().requires_grad_(wants)
        inputs = {
            name: value[rows].to(leaf)
            for name, value in task.datum.inputs.items()
            if value.is_floating_point()
        }
        with torch.set_grad_enabled(wants):
            loss = task.loss.terms(leaf, inputs, task.settings).sum()
        task.loss_sum += float(loss.detach())
        task.logprobs[rows] = leaf.detach().to(task.logprobs)
        if wants:
            slopes += torch.autograd.grad(loss, leaf)
    if wants:
        for piece, gradient in zip(chunk, torch.autograd.grad(logps, xs, slopes), strict=True):
            piece.gradient[piece.rows] = gradient  # type: ignore[index]


def _logp(piece: _Piece, logits: Tensor) -> Tensor:
    target = piece.task.datum.inputs["target_tokens"][piece.rows].to(logits.device)
    return logits.gather(1, target) - logits.logsumexp(1, keepdim=True)
