"""Trained copies of the base's own parameters (its biases, or all of them) that replace the originals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import TargetError, listing
from lorica.find import all_biases
from lorica.layers.masters import HALVES, Lowering, lower
from lorica.layers.saved import read_by
from lorica.piece import Beginning, Held, Piece, Rows
from lorica.pieces import Kind, Search, register
from lorica.state import AdapterState
from lorica.tree import base_parameters, is_sharded, module_at, owner_of, within_any


class ParameterCopy(Piece):
    """A trained copy of a parameter.

    Args:
        path: the parameter's name in the base.
        parameter: the copy; float32 beside a parameter in half precision.
        shadow: whether another piece saves the same copy, under another name of a tied parameter.
        owner: the module that computes by it rounded, where it is of higher precision than the base's.
    """

    places = True

    def __init__(
        self, path: str, parameter: Parameter, *, shadow: bool = False, owner: nn.Module | None = None
    ) -> None:
        super().__init__(path)
        self.parameter, self.shadow, self.owner = parameter, shadow, owner
        self.master = owner is not None
        self.state: AdapterState | None = None
        self.holder: nn.Module | None = None

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        self.state, self.parameter.requires_grad = state, trainable
        self.holder = owner_of(root, self.path)[0]
        if self.owner is not None:
            if state.anchor is None:
                state.anchor = _anchor(root, state.pieces[name])
            lower(self.owner, state, self.path.rpartition(".")[0])

    def off(self, root: nn.Module, name: str) -> None:
        """Nothing to undo: an adapter that does not act replaces nothing."""
        assert self.state is not None
        if self.owner is not None and not any(
            isinstance(piece, ParameterCopy) and piece.owner is self.owner
            for pieces in self.state.pieces.values()
            for piece in pieces
        ):
            Lowering.off(self.owner)

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        if not self.shadow:
            acts = self.state is not None and name in self.state.active
            yield Held(self.path, self.path if acts else None, self._part() if acts else self.parameter)

    def _part(self) -> Tensor:
        """The copy, or where the model was sharded since, what this rank holds of it."""
        assert self.holder is not None
        stands = self.holder._parameters[self.path.rpartition(".")[2]]
        return stands if stands is not None and is_sharded(stands) else self.parameter

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:
        """The base's own value."""
        for held in self.tensors(name):
            yield held.tensor, at.state.base_parameter(at.root, self.path)

    def stand_ins(self, name: str) -> Mapping[str, Tensor]:  # noqa: D102
        state = self.state
        if self.owner is None or state is None or state.rounded is None:
            return {self.path: self.parameter}
        if self.parameter not in state.rounded:
            base = state.originals.get(self.path, self.owner._parameters[self.path.rpartition(".")[2]])
            values = self.parameter.detach().to(state.dtype_now(base))
            state.rounded[self.parameter] = Parameter(values, requires_grad=False)
        return {self.path: state.rounded[self.parameter]}

    def claims(self, name: str) -> Mapping[str, Rows]:  # noqa: D102
        return {self.path: None}


class ParameterCopies(Kind):
    """Finds the biases that a LoRA trains (`bias`), and the base's parameters that other methods train."""

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
    raised = _Raised(search)
    for name in names:
        base = have[name]
        known = base in own
        owner = raised.owner(name, base)
        if not known:
            copy = base.detach() if search.dry else base.detach().clone()
            own[base] = Parameter(copy if owner is None else copy.float())
        # PEFT looks for what is tied under each of its names; elsewhere one is enough.
        yield ParameterCopy(name, own[base], shadow=known and search.lora is None, owner=owner)


def _brought(search: Search, names: list[str]) -> Iterator[ParameterCopy]:
    """The base's parameters that the adapter holds: those it trains, and any other that differs.

    PEFT writes an adapted embedding's own table beside its factors. As a rule that equals the base's, and
    nothing has to be replaced.
    """
    assert search.adapter is not None
    extras, have, trained = search.adapter.extras, base_parameters(search.root), set(names)
    own: dict[Parameter, Parameter] = {}
    raised = _Raised(search)
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
            known, owner = base in own, raised.owner(path, base) if path in trained else None
            copy = copy if owner is None else tensor.to(base.device, torch.float32, copy=True)
            own.setdefault(base, Parameter(copy))
            yield ParameterCopy(path, own[base], shadow=known and not search.lora, owner=owner)
        if path not in trained:
            search.passed_over.add(path)
    for path in names:
        if (base := have[path]) in own and path not in extras:
            owner = raised.owner(path, base)
            yield ParameterCopy(path, own[base], shadow=search.lora is None, owner=owner)
    # PEFT leaves out an attention's in_proj_bias, and whatever else is not called just "bias".
    given = {id(have[path]) for path in extras if path in have}
    needed = [path for path in names if search.lora is None or path.rpartition(".")[2] == "bias"]
    search.missing[:0] = [path for path in needed if id(have[path]) not in given]


class _Raised:
    """Says which parameters get a float32 copy.

    Parameters in half precision do, except where a parent reads one without calling its module, which takes
    the base's dtype, and in modules that hold their weights twice or run outside Python. A tied parameter
    must satisfy this under each of its names.

    Args:
        search: the search for the adapter's pieces.
    """

    def __init__(self, search: Search) -> None:
        self.root = search.root
        self.names: dict[Parameter, list[str]] = {}
        for path, parameter in base_parameters(search.root).items():
            if parameter.dtype in HALVES and not search.dry:
                self.names.setdefault(parameter, []).append(path)

    def owner(self, name: str, base: Parameter) -> nn.Module | None:
        """The module of a parameter that gets a float32 copy; None if the copy keeps the base's dtype."""
        for path in self.names.get(base, ()):
            above = path.rpartition(".")[0]
            owner, parent = module_at(self.root, above), module_at(self.root, above.rpartition(".")[0])
            if isinstance(owner, (nn.RNNBase, torch.jit.ScriptModule)) or read_by(parent, owner):
                return None
            if "_hf_hook" in owner.__dict__ or "parametrizations" in owner._modules:
                return None
        return owner_of(self.root, name)[0] if base in self.names else None


def _anchor(root: nn.Module, pieces: Iterable[Piece]) -> tuple[Parameter | None, torch.dtype]:
    """A half-precision parameter of the base that none of these pieces replaces, and its dtype."""
    copied = {piece.path for piece in pieces}
    for name, parameter in base_parameters(root).items():
        if name not in copied and parameter.dtype in HALVES:
            return parameter, parameter.dtype
    return None, torch.float32


register(ParameterCopies(), "bias", "selective")
