"""Tied parameters (embedding and head) whose merged weights differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.model.merging.steps import STEPS, MergeStep
from lorica.state import AdapterState
from lorica.tree import base_parameters, parameter_at, put_at


@dataclass(eq=False)
class Ties(MergeStep):
    """The ties of the base, and the changes that let a merged model be saved.

    Args:
        groups: names that share one parameter in the base.
        originals: name that received a copy → the parameter before.
        joined: merged parameters that were replaced by an equal one.
        stacked: whether blocks share their weights (`layer_replication`), which no file records.
        config: the transformers configuration that said "tied".
    """

    groups: list[list[str]]
    stacked: bool = False
    originals: dict[str, Parameter] = field(default_factory=dict)
    joined: list[Parameter] = field(default_factory=list)
    config: Any = None

    @classmethod
    def of(cls, root: nn.Module, state: AdapterState) -> Ties:
        """The ties of a model that holds the base's own weights."""
        names: dict[Parameter, list[str]] = {}
        for name, parameter in base_parameters(root).items():
            names.setdefault(parameter, []).append(name)
        return cls([group for group in names.values() if len(group) > 1], state.stack is not None)

    def do(self, root: nn.Module) -> list[str]:
        """Let a transformers model save weights that are no longer equal; returns the modules concerned.

        A file that says "tied" would lose one of two weights that differ, so the configuration must not say
        it. Weights that are still equal are then written under each name, because no reader ties them.
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
                        self.originals[name] = put_at(root, name, copy)
                    held.add(parameter)
        return list(dict.fromkeys(name.rpartition(".")[0] for names in apart for name in names))

    def _join(self, root: nn.Module) -> None:
        """Join merged parameters that are equal, as one update of tied tables leaves them."""
        for names in self.groups:
            first = parameter_at(root, names[0])
            for name in names[1:]:
                other = parameter_at(root, name)
                if other is not first and _equal(first, other):
                    self.joined.append(put_at(root, name, first))
                    other.data = first.data

    def undo(self, root: nn.Module) -> None:
        """Take back `do`, except for parameters that others put back."""
        for name, parameter in self.originals.items():
            put_at(root, name, parameter)
        self.originals.clear()
        for parameter in self.joined:  # another merge may write to it
            parameter.data = torch.empty_like(parameter)
        self.joined.clear()
        if self.config is not None:
            self.config.tie_word_embeddings, self.config = True, None


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.device == other.device and one.shape == other.shape
    return alike and torch.equal(one, other)


STEPS.append(Ties.of)
