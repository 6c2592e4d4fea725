"""What says which kind of layer a module becomes; each kind's file adds to it, and `lorica.check` asks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lorica.layers.base import LoraLayer

Rule = Callable[[type[LoraLayer] | None, nn.Module], type[LoraLayer] | None]
"""(Kind of layer so far, module) → the kind that the module becomes, or the one so far."""
RULES: list[Rule] = []
"""What is asked of every module but a plain `nn.Linear`; each rule sees what those before it found."""
PARTS: dict[type[nn.Module], type[LoraLayer]] = {}
"""Class of a parent that multiplies by the weights of its plain `nn.Linear`s itself → what these become."""
READ: dict[type[LoraLayer], Callable[[nn.Module, nn.Module], type[LoraLayer]]] = {}
"""Kind of layer → (module, its parent) → its kind, where the parent's code may read its weight."""
