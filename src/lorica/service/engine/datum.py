"""One sequence to learn from: the model's tokens, and the loss's inputs at each of its positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorica.service.engine.losses import LOSSES, Loss
from lorica.service.errors import UserError

_KNOWN = {name for loss in LOSSES.values() for name in (*loss.needs, *loss.takes)}


@dataclass(frozen=True, eq=False)
class Datum:
    """A sequence.

    Args:
        tokens: the model's input (N,), int64.
        inputs: name → numbers (N,) or (N, K). Position i of `tokens` predicts ``target_tokens[i]``: the shift
            is the caller's. With K targets for a position each has its own weight.
    """

    tokens: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Sequence[int] | Tensor, **inputs: Any) -> Datum:
        """From lists or tensors; sparse ones (CSR) become dense."""
        return cls(
            _ids("tokens", torch.as_tensor(tokens)),
            {name: as_input(name, value) for name, value in inputs.items()},
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def ready(self, loss: Loss, name: str, *, context: int, vocabulary: int) -> Datum:
        """The same with what `loss` reads alone, each input (N, K).

        Args:
            loss: to be computed.
            name: of it, for messages.
            context: the longest sequence that the model takes.
            vocabulary: token ids are below it.

        Raises:
            UserError: an input is missing, unknown or of another shape; a token is out of range; or the
                sequence is empty or too long.
        """
        n = len(self.tokens)
        if not 0 < n <= context:
            raise UserError(f"a datum has {n} tokens; this model takes 1 to {context}")
        check_tokens("model_input", self.tokens, vocabulary)
        missing = [key for key in loss.needs if key not in self.inputs]
        if missing:
            raise UserError(f"loss_fn={name!r} needs loss_fn_inputs {missing}, got {sorted(self.inputs)}")
        unknown = sorted(set(self.inputs) - {*loss.needs, *loss.takes} - _KNOWN)
        if unknown:
            raise UserError(f"loss_fn={name!r} takes no loss_fn_inputs {unknown}")
        targets = self.inputs["target_tokens"]
        if targets.dim() not in (1, 2) or targets.shape[0] != n or targets.numel() == 0:
            raise UserError(
                f"target_tokens must be ({n},) or ({n}, K), as model_input has {n} tokens, "
                f"not {tuple(targets.shape)}"
            )
        check_tokens("target_tokens", targets, vocabulary)
        targets = targets.reshape(n, -1)
        ready = {"target_tokens": targets, "weights": torch.ones(targets.shape)}
        for key in (*loss.needs, *loss.takes):
            if key not in self.inputs or key == "target_tokens":
                continue
            value = self.inputs[key]
            if value.shape not in ((n,), targets.shape):
                raise UserError(
                    f"{key} must have the shape of target_tokens, {tuple(self.inputs['target_tokens'].shape)}"
                    f", not {tuple(value.shape)}"
                )
            if not torch.isfinite(value).all():
                raise UserError(f"{key} holds NaN or infinity")
            ready[key] = value.reshape(n, -1).expand(targets.shape)
        return Datum(self.tokens, ready)


def as_input(name: str, value: Any) -> Tensor:
    """An input as a dense tensor: `target_tokens` in int64, real numbers in float32."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return _ids(name, tensor) if name == "target_tokens" else tensor.to(torch.float32)


def _ids(name: str, tokens: Tensor) -> Tensor:
    """Token ids in int64, none of which is rounded to another.

    Raises:
        UserError: one is no whole number.
    """
    ids = tokens.to(torch.long)
    if tokens.is_floating_point() and not torch.equal(ids.to(tokens.dtype), tokens):
        raise UserError(f"{name} holds a number that is no token id; they are whole")
    return ids


def check_tokens(name: str, tokens: Tensor, vocabulary: int) -> None:
    """Refuse token ids that the model has no row for.

    Raises:
        UserError: naming one.
    """
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"{name} holds token {low if low < 0 else high}; this model's are 0 to {vocabulary - 1}"
        )
