"""Rules for the kind of layer that a module becomes: each kind's file adds its own, `lorica.check` asks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lorica.layers.base import LoraLayer

Rule = Callable[[type[LoraLayer] | None, nn.Module], type[LoraLayer] | None]
"""(Kind of layer so far, module) → the kind that the module becomes, or the one so far."""
KINDS: dict[type[nn.Module], type[LoraLayer]] = {}
"""Class of a module → the kind that its instances become, as far as no rule has another."""
RULES: list[Rule] = []
"""Rules for every module but a plain `nn.Linear`; each sees the findings of those before it."""
PARTS: dict[type[nn.Module], type[LoraLayer]] = {}
"""Class of a parent that multiplies by the weights of its plain `nn.Linear`s itself → what these become."""
READ: dict[type[LoraLayer], Callable[[nn.Module, nn.Module], type[LoraLayer]]] = {}
"""Kind of layer → (module, its parent) → its kind, where the parent's code may read its weight."""
