"""The terms of a sum: adapters with their weights, layer by layer; refuses adapters that have no sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from lorica.adapter import Adapter, Factors
from lorica.algebra.settings import agreed, describing, tied
from lorica.algebra.spectrum import Term
from lorica.config.checks import is_number
from lorica.errors import AdapterError, ConfigError, lines, listing

Join = Callable[[str, list[Term], Factors], Factors]
"""A layer's path, its updates with their weights, and an update of the result's layout → the result."""


@dataclass(frozen=True)
class Terms:
    """Adapters and their weights."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Self:
        """Adapters with their weights; None gives each a weight of 1.

        Raises:
            ConfigError: there is no adapter, or not a finite weight for each.
            AdapterError: one has updates of parameters, or was trained beside another weight than W0.
        """
        adapters = list(adapters) if isinstance(adapters, Iterable) else [adapters]
        if not adapters:
            raise ConfigError("there is no adapter to work on; give at least one")
        for adapter in adapters:
            check_no_parameters(Adapter.check(adapter))
        chosen = [1.0] * len(adapters) if weights is None else _numbers(weights)
        if len(chosen) != len(adapters) or not all(map(is_number, chosen)):
            raise ConfigError(
                f"expected {len(adapters)} finite weights, one for each adapter, not {weights!r:.80}"
            )
        for adapter in adapters:
            adapter.check_on_base("calculate with an adapter")
        return cls(tuple(adapters), tuple(chosen))

    @property
    def paths(self) -> list[str]:
        """Paths of all layers that any of the adapters has, in order of appearance."""
        return list(dict.fromkeys(path for adapter in self.adapters for path in adapter.factors))

    @property
    def rank(self) -> int:
        """The highest rank of a layer."""
        return max(f.r for adapter in self.adapters for f in adapter.factors.values())

    def at(self, path: str) -> list[Term]:
        """The updates at a path, with their weights."""
        pairs = zip(self.adapters, self.weights, strict=True)
        return [(adapter.factors[path], weight) for adapter, weight in pairs if path in adapter.factors]

    def join(self, how: Join, keep: int | None) -> Adapter:
        """One adapter made of all: updates joined layer by layer, and the rest, on which they must agree.

        Args:
            how: joins the updates of a layer to one of scale 1; biases (`lora_bias`) are added up.
            keep: index of the adapter whose head, biases and task are taken; None if they do not differ.

        Raises:
            AdapterError: the adapters have no sum, or their heads, biases or tasks differ and `keep` is None.
            ConfigError: `keep` is no index.
        """
        self.check_magnitudes()
        self.check_layers()
        config, extras, classes = agreed(self.adapters, self.paths, keep)
        factors = {path: _join(how, path, self.at(path)) for path in self.paths}
        made = tied(config, factors, self.adapters)
        return Adapter(describing(config, factors), made, extras, classes=classes)

    def check_magnitudes(self) -> None:
        """Refuse DoRA.

        Raises:
            AdapterError: an adapter has magnitudes.
        """
        found = [path for path in self.paths if any(f.magnitude is not None for f, _ in self.at(path))]
        if found:
            raise AdapterError(
                "DoRA brings the rows of W0 + B·A to trained magnitudes, so its updates neither add up nor "
                f"scale: {listing(found, limit=3)}. Merge such an adapter into its base instead"
            )

    def check_layers(self) -> None:
        """Refuse layers that differ.

        Raises:
            AdapterError: lists the paths at which kinds or shapes differ.
        """
        forms = {
            path: list(dict.fromkeys(_form(factors) for factors, _ in self.at(path))) for path in self.paths
        }
        problems = [f"{path}: {' and '.join(form)}" for path, form in forms.items() if len(form) > 1]
        if problems:
            raise AdapterError(
                f"the adapters are not for the same base; these layers differ:\n{lines(problems)}"
            )


def _numbers(given: Any) -> list[float]:
    """Weights as Python's numbers; none where they are no numbers."""
    if isinstance(given, str):
        return []
    try:
        return [float(weight) for weight in given]
    except (TypeError, ValueError, OverflowError):
        return []


def check_no_parameters(adapter: Adapter) -> None:
    """Refuse updates of parameters, whose factors interleave those of several experts.

    Raises:
        AdapterError: naming them.
    """
    found = [path for path, factors in adapter.factors.items() if factors.kind == "parameter"]
    if found:
        raise AdapterError(
            f"updates of parameters (target_parameters) are not combined or compressed: "
            f"{listing(found, limit=3)}; merge such an adapter into its base instead"
        )


def _form(factors: Factors) -> str:
    groups = f" in {factors.groups} groups" if factors.groups > 1 else ""
    inputs = " × ".join(map(str, factors.A.shape[1:]))
    return f"{factors.kind} {inputs} → {factors.B.shape[0]}{groups}"


def _join(how: Join, path: str, updates: list[Term]) -> Factors:
    """A layer's updates joined by `how`; their biases (`lora_bias`) are added up."""
    like = _like(updates)
    biases = [f.bias.detach().double() * (w * f.scale) for f, w in updates if f.bias is not None]
    bias = torch.stack(biases).sum(0).to(like.B.dtype) if biases else None
    return dataclasses.replace(how(path, updates, like), bias=bias)


def _like(updates: Sequence[Term]) -> Factors:
    """The first update, in the dtype of all, and float32 at least.

    Half precision would round the sum's weights, which its factors take up.
    """
    dtype = torch.float32
    for factors, _ in updates:
        dtype = torch.promote_types(dtype, torch.promote_types(factors.A.dtype, factors.B.dtype))
    first = updates[0][0]
    return dataclasses.replace(first, A=first.A.detach().to(dtype), B=first.B.detach().to(dtype), bias=None)
