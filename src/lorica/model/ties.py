"""Parameters that stand under several names (tied embeddings), while merged weights differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import Parameter

from lorica.model.structure import base_parameters
from lorica.roster import place


@dataclass(eq=False)
class Ties:
    """What is tied in the base, and what was done so that a merged model can be saved.

    Args:
        groups: the names that share one parameter in the base.
        copies: names that got a copy, and their original.
        stacked: whether blocks share their weights (`layer_replication`), which no file says.
        config: a transformers configuration that said "tied".
    """

    groups: list[list[str]]
    stacked: bool = False
    copies: dict[str, Parameter] = field(default_factory=dict)
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
        apart = [names for names in self.groups if len({root.get_parameter(name) for name in names}) > 1]
        config = getattr(root, "config", None)
        tied = config is not None and getattr(config, "tie_word_embeddings", False)
        if apart and tied:
            self.config, config.tie_word_embeddings = config, False  # type: ignore[union-attr]
        if apart and (tied or self.stacked):
            for names in self.groups:
                held: set[Parameter] = set()
                for name in names:
                    parameter = root.get_parameter(name)
                    if parameter in held:
                        copy = Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                        self.copies[name] = place(root, name, copy)
                    held.add(parameter)
        return list(dict.fromkeys(name.rpartition(".")[0] for names in apart for name in names))

    def redo(self, root: nn.Module) -> None:
        """Take back `undo`."""
        for name, parameter in self.copies.items():
            place(root, name, parameter)
        self.copies.clear()
        if self.config is not None:
            self.config.tie_word_embeddings, self.config = True, None
