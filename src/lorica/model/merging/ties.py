"""Parameters that stand under several names (tied embeddings), while merged weights differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.tree import base_parameters, parameter_at, put_at


@dataclass(eq=False)
class Ties:
    """What is tied in the base, and what was done so that a merged model can be saved.

    Args:
        groups: the names that share one parameter in the base.
        copies: names that got a copy, and their original.
        joined: merged parameters in whose place stands another that is equal.
        stacked: whether blocks share their weights (`layer_replication`), which no file says.
        config: a transformers configuration that said "tied".
    """

    groups: list[list[str]]
    stacked: bool = False
    copies: dict[str, Parameter] = field(default_factory=dict)
    joined: list[Parameter] = field(default_factory=list)
    config: Any = None

    @classmethod
    def of(cls, root: nn.Module, *, stacked: bool = False) -> Ties:
        """The ties of a model whose weights are the base's own."""
        names: dict[Parameter, list[str]] = {}
        for name, parameter in base_parameters(root).items():
            names.setdefault(parameter, []).append(name)
        return cls([group for group in names.values() if len(group) > 1], stacked)

    def undo(self, root: nn.Module) -> list[str]:
        """Let a transformers model keep, when it is saved, what no longer is the same; returns those modules.

        A file that says "tied" would lose one of the weights that now differ, so it must not say that. And
        what is still the same must then be written under each of its names, for the reader will not tie it.
        """
        self._join(root)
        apart = [names for names in self.groups if len({parameter_at(root, name) for name in names}) > 1]
        config = getattr(root, "config", None)
        tied = config is not None and getattr(config, "tie_word_embeddings", False)
        if apart and tied:
            self.config, config.tie_word_embeddings = config, False  # type: ignore[union-attr]
        if apart and (tied or self.stacked):
            for names in self.groups:
                held: set[Parameter] = set()
                for name in names:
                    parameter = parameter_at(root, name)
                    if parameter in held:
                        copy = Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                        self.copies[name] = put_at(root, name, copy)
                    held.add(parameter)
        return list(dict.fromkeys(name.rpartition(".")[0] for names in apart for name in names))

    def _join(self, root: nn.Module) -> None:
        """Make one again what was merged apart and is equal, as one update of tied tables leaves it."""
        for names in self.groups:
            first = parameter_at(root, names[0])
            for name in names[1:]:
                other = parameter_at(root, name)
                if other is not first and _equal(first, other):
                    self.joined.append(put_at(root, name, first))
                    other.data = first.data

    def redo(self, root: nn.Module) -> None:
        """Take back `undo`, as far as what is put back by others does not."""
        for name, parameter in self.copies.items():
            put_at(root, name, parameter)
        self.copies.clear()
        for parameter in self.joined:  # to be written to again, if another adapter is merged in its place
            parameter.data = torch.empty_like(parameter)
        self.joined.clear()
        if self.config is not None:
            self.config.tie_word_embeddings, self.config = True, None


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.device == other.device and one.shape == other.shape
    return alike and torch.equal(one, other)
