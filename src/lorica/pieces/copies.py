"""Copies of the base's own parameters (its biases, or all of it), which stand in their place and train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import TargetError, listing
from lorica.find import all_biases
from lorica.piece import Held, Piece, Rows
from lorica.pieces import Kind, Search, register
from lorica.state import AdapterState
from lorica.tree import base_parameters, within_any


class ParameterCopy(Piece):
    """A trained copy of a parameter.

    Args:
        path: the parameter's name in the base.
        parameter: the copy.
        shadow: whether another piece has the same copy, under another of its names, and saves it.
    """

    places = True

    def __init__(self, path: str, parameter: Parameter, *, shadow: bool = False) -> None:
        super().__init__(path)
        self.parameter, self.shadow = parameter, shadow
        self.state: AdapterState | None = None

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        self.state, self.parameter.requires_grad = state, trainable

    def off(self, root: nn.Module, name: str) -> None:
        """Nothing is left to do: an adapter that does not act has nothing in the base's place."""

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        if not self.shadow:
            acts = self.state is not None and name in self.state.active
            yield Held(self.path, self.path if acts else None, self.parameter)

    def stand_ins(self, name: str) -> Mapping[str, Tensor]:  # noqa: D102
        return {self.path: self.parameter}

    def claims(self, name: str) -> Mapping[str, Rows]:  # noqa: D102
        return {self.path: None}


class ParameterCopies(Kind):
    """Finds the biases that a LoRA trains (`bias`), and what other methods train of the base."""

    brought = "extras"

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        return ()

    def finish(self, search: Search) -> None:  # noqa: D102
        names = [*_biases(search), *search.trained]
        search.pieces += _brought(search, names) if search.adapter is not None else _fresh(search, names)


def _biases(search: Search) -> Iterator[str]:
    """Names of the base's biases that the LoRA trains."""
    lora = search.lora
    if lora is None or lora.bias == "none":
        return
    adapted = {target.path for target in search.targets}
    for name in all_biases(search.root, search.whole):
        if lora.bias == "all" or name.rpartition(".")[0] in adapted:
            yield name


def _fresh(search: Search, names: list[str]) -> Iterator[ParameterCopy]:
    """A copy of each named parameter; tied ones stay tied.

    Raises:
        TargetError: two of the methods own one parameter.
    """
    have = base_parameters(search.root)
    updated = {t.module._parameters.get(t.parameter or t.layer.weight_name) for t in search.targets}
    twice = [name for name, times in Counter(names).items() if times > 1]
    twice += [name for name in names if have[name] in updated]
    if twice:
        raise TargetError(f"two of the methods own the same parameter: {listing(twice, limit=5)}")
    own: dict[Parameter, Parameter] = {}
    for name in names:
        base = have[name]
        known = base in own
        if not known:
            own[base] = Parameter(base.detach() if search.dry else base.detach().clone())
        # PEFT looks for what is tied under each of its names; elsewhere one is enough.
        yield ParameterCopy(name, own[base], shadow=known and search.lora is None)


def _brought(search: Search, names: list[str]) -> Iterator[ParameterCopy]:
    """What the adapter brings of the base's parameters: those that it trains, and whatever else differs.

    PEFT writes an adapted embedding's own table beside its factors; as a rule it is the base's, and there is
    nothing to replace.
    """
    assert search.adapter is not None
    extras, have, trained = search.adapter.extras, base_parameters(search.root), set(names)
    own: dict[Parameter, Parameter] = {}
    for path, tensor in extras.items():
        base = have.get(path)
        if base is None or within_any(path, search.whole):
            continue
        if base.shape != tensor.shape:
            search.problems.append(
                f"shape of {path}: {tuple(tensor.shape)} in the adapter, {tuple(base.shape)} in the model"
            )
            search.passed_over.add(path)
            continue
        copy = tensor.to(base, copy=True)
        if path in trained or not torch.equal(copy, base):
            known = base in own
            yield ParameterCopy(path, own.setdefault(base, Parameter(copy)), shadow=known and not search.lora)
        if path not in trained:
            search.passed_over.add(path)
    for path in names:
        if have[path] in own and path not in extras:
            yield ParameterCopy(path, own[have[path]], shadow=search.lora is None)
    # PEFT leaves out an attention's in_proj_bias, and whatever else is not called just "bias".
    given = {id(have[path]) for path in extras if path in have}
    needed = [path for path in names if search.lora is None or path.rpartition(".")[2] == "bias"]
    search.missing[:0] = [path for path in needed if id(have[path]) not in given]


register(ParameterCopies(), "bias", "selective")
