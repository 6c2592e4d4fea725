"""The linear layers of a causal model: attention's, the head, and the rest of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorica.service.errors import UserError

_ATTENTION = ("attn", "attention")


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module does nothing but multiply by a weight and add a bias."""
    return type(module) in (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Targets:
    """The layers that an adapter may have updates for, by path.

    Args:
        attn: inside a module whose name says attention.
        mlp: the other ones.
        unembed: the output head; empty where it is no plain linear layer.
    """

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    unembed: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, head: nn.Module | None) -> Targets:
        """Of a causal model and its output head."""
        attn, mlp, unembed = [], [], []
        for path, module in model.named_modules():
            if module is head:
                unembed += [path] if is_linear(module) else []
            elif is_linear(module):
                inside = any(word in part for part in path.lower().split(".") for word in _ATTENTION)
                (attn if inside else mlp).append(path)
        return cls(tuple(attn), tuple(mlp), tuple(unembed))

    def chosen(self, *, unembed: bool, mlp: bool, attn: bool) -> list[str]:
        """Those of the sorts asked for.

        Raises:
            UserError: there are none, or a head is asked for that cannot be adapted.
        """
        if unembed and not self.unembed:
            raise UserError("the base's output head is no plain linear layer; ask for train_unembed=False")
        paths = [*(self.attn if attn else ()), *(self.mlp if mlp else ()), *(self.unembed if unembed else ())]
        if not paths:
            raise UserError(
                f"nothing to train: train_attn={attn}, train_mlp={mlp}, train_unembed={unembed}, and the "
                f"base has {len(self.attn)} linear layers of attention, {len(self.mlp)} others and "
                f"{len(self.unembed)} output head"
            )
        return paths

    def named(self, paths: Sequence[str]) -> list[str]:
        """The shortest names that mean exactly these paths: last parts, where they mean no others."""
        leaves = {path.rpartition(".")[2] for path in paths}
        meant = [p for p in (*self.attn, *self.mlp, *self.unembed) if p.rpartition(".")[2] in leaves]
        return sorted(leaves) if len(meant) == len(paths) else sorted(paths)
