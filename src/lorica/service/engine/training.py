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
        error: the error of its forward pass.
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
    groups = _abreast(base, tasks)
    lanes = _through(base, tasks, groups, backward=backward)
    if any(lane.error is not None and len(group) > 1 for group, lane in zip(groups, lanes, strict=True)):
        groups = [[i] for i in range(len(tasks))]  # whoever it is, the others get their results
        lanes = _through(base, tasks, groups, backward=backward)
    pieces: dict[int, list[_Piece]] = {}
    hidden: list[tuple[Tensor, Tensor]] = []
    for group, lane in zip(groups, lanes, strict=True):
        if lane.error is not None:
            tasks[group[0]].error = lane.error
            continue
        read: Read = lane.result
        gradient = torch.zeros_like(read.hidden) if backward else None
        if gradient is not None:
            hidden.append((read.hidden, gradient))
        for row, i in enumerate(group):
            own = read._replace(hidden=read.hidden.detach()[row])
            pieces[i] = list(_pieces(tasks[i], own, None if gradient is None else gradient[row]))
    for chunk in _chunks([piece for i in sorted(pieces) for piece in pieces[i]]):
        _compute(base, chunk)
    if hidden:
        torch.autograd.backward([h for h, _ in hidden], [g for _, g in hidden])


def _abreast(base: Base, tasks: Sequence[Task]) -> list[list[int]]:
    """Groups of tasks that share a call of the model: of one length, those of an adapter side by side."""
    alike: dict[int, dict[int, list[int]]] = {}
    for i, task in enumerate(tasks):
        of_length = alike.setdefault(base.abreast.filled(len(task.datum)), {})
        of_length.setdefault(id(task.weights), []).append(i)
    groups = []
    for length, by_adapter in alike.items():
        order, most = [i for own in by_adapter.values() for i in own], base.abreast.most(length)
        groups += [order[i : i + most] for i in range(0, len(order), most)]
    return groups


def _through(
    base: Base, tasks: Sequence[Task], groups: Sequence[Sequence[int]], *, backward: bool
) -> list[Lane]:
    """Lanes that have been through the model."""
    lanes = []
    for group in groups:
        some = [tasks[i] for i in group]
        lanes.append(Lane([task.weights for task in some], partial(_read, base, some), group))
    with base.running(backward=backward):
        try:
            run(lanes)
        finally:
            for lane in lanes:
                lane.abandon()
    return lanes


def _read(base: Base, tasks: Sequence[Task], lane: Lane) -> Any:
    tokens = torch.zeros(len(tasks), base.abreast.filled(len(tasks[0].datum)), dtype=torch.long)
    for row, task in zip(tokens, tasks, strict=True):
        row[: len(task.datum)] = task.datum.tokens
    return base.read(tokens)


def _pieces(task: Task, read: Read, gradient: Tensor | None) -> Iterator[_Piece]:
    """At most `CHUNK` rows each; those that have no part in the gradient by themselves."""
    task.logprobs = torch.empty(task.datum.inputs["target_tokens"].shape)
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
    xs = [piece.read.hidden[piece.rows].requires_grad_(wants) for piece in chunk]
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
