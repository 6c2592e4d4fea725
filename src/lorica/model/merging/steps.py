"""Steps of a merge besides the adapted modules; each registers itself (`plugins`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import Parameter

from lorica.state import AdapterState

Into = Literal["quantized", "dequantized"]


class MergeStep(ABC):
    """A change that a merge makes besides putting merged values into the adapted modules.

    Attributes:
        originals: name → parameter of the base that it replaced.
    """

    originals: dict[str, Parameter]

    @abstractmethod
    def do(self, root: nn.Module) -> list[str]:
        """Make the change, once the merged values are in the model; returns modules no longer tied."""

    @abstractmethod
    def undo(self, root: nn.Module) -> None:
        """Take it back, before other values come."""


STEPS: list[Callable[[nn.Module, AdapterState], MergeStep]] = []
"""Functions that make the steps of a merge, of a model that holds the base's own weights."""


class Packed(ABC):
    """The packed weights of a model during a merge.

    Attributes:
        into: what they become.
        plain: the dtype of the plain weights that they become; None where they are packed again.
        weights: path → plain weight, once `take` has made them.
    """

    into: Into
    plain: torch.dtype | None
    weights: dict[str, Parameter]

    @abstractmethod
    def take(self, merged: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the plain weights; `merged`: path → name → merged value."""

    @abstractmethod
    def do(self, root: nn.Module) -> None:
        """Make the layers plain, once they are in their base form."""

    @abstractmethod
    def undo(self, root: nn.Module) -> None:
        """Make them packed again."""


PACKED: list[Callable[[nn.Module, Into | None, list[str]], Packed | None]] = []
"""Functions that look at a model's packed weights, of (model, `into`, paths of those that take an update)."""
