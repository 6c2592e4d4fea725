"""Parameters that a module's own forward reads, such as the stacked weights of a mixture of experts.

    gate_up_proj  (experts, out, in)  ──shown as──▶  W0[e] + scale·B[e]·A[e]   for every expert e

The module keeps its forward; under the parameter's name it reads the merged weight, computed once per call.
W0 itself is never written to, and nothing is registered or removed during the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica import functional
from lorica.adapter import Factors, Kind
from lorica.errors import StateError, listing
from lorica.folding import fold
from lorica.layers.base import LoraLayer
from lorica.layers.swapped import Factor
from lorica.layers.variants import PLAIN
from lorica.tree import is_sharded


class ParameterUpdate(nn.Module):
    """The low-rank updates of one parameter (d_out, d_in) or (experts, ...), one per adapter.

    A (experts·r, d_in) holds expert after expert; in B (d_out, r·experts) an expert's columns are `experts`
    apart, as in PEFT.
    """

    kind: ClassVar[Kind] = "parameter"

    def __init__(self, experts: int | None, transposed: bool) -> None:
        super().__init__()
        self.experts, self.transposed = experts, transposed
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}

    def factor_parameters(self, name: str) -> tuple[Parameter, Parameter]:
        """The adapter's A and B."""
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def factor_names(self, name: str) -> tuple[str, str]:
        """Names of the adapter's A and B among this module's parameters."""
        return f"lora_A.{name}.weight", f"lora_B.{name}.weight"

    def magnitude_parameter(self, name: str) -> None:
        """None, for DoRA needs a layer that is called."""

    def bias_parameter(self, name: str) -> None:
        """None, for `lora_bias` needs a layer that is called."""

    def delta_factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two stacks of matrices, one per expert, whose product, times the scale, is the delta weight."""
        A, B = self.factor_parameters(name)
        return self._laid_out(A.to(dtype), B.to(dtype))

    def _laid_out(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """As `delta_factors`, for any A and B."""
        if self.experts is None:
            return B, A
        A = A.reshape(self.experts, -1, A.shape[1])
        B = B.reshape(B.shape[0], -1, self.experts).permute(2, 0, 1)
        return (A.mT, B.mT) if self.transposed else (B, A)

    def factors(self, name: str) -> Factors:
        """The adapter's update as a value that shares memory with the parameters."""
        A, B = self.factor_parameters(name)
        return Factors(A.detach(), B.detach(), self.scaling[name], self.kind)

    def fold(self, W0: Tensor, names: Sequence[str], precision: torch.dtype, *, out: Tensor) -> None:
        """Write ``W0 + Σ scale·B·A`` to `out`, one expert after another, each rounded once."""
        present = [name for name in names if name in self.scaling]
        products = [(*self.delta_factors(name, precision), self.scaling[name]) for name in present]
        single = self.experts is None
        stacks = [(left[None], right[None], s) if single else (left, right, s) for left, right, s in products]
        for i, (matrix, stored) in enumerate(
            zip(*(t[None] if single else t for t in (W0, out)), strict=True)
        ):
            total = matrix
            for left, right, scale in stacks[:-1]:
                total = fold(total, left[i], right[i], scale)
            left, right, scale = stacks[-1]
            fold(total, left[i], right[i], scale, out=stored)

    def added(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """``weight + Σ scale·B·A`` over the named adapters with an update here; differentiable."""
        add = torch.addmm if self.experts is None else torch.baddbmm
        for name in names:
            if name in self.scaling:
                A, B, scale = functional.evened(*self.factor_parameters(name), self.scaling[name])
                matrices = self._laid_out(A.to(weight.dtype), B.to(weight.dtype))
                weight = add(weight, *matrices, alpha=scale)
        return weight


class LoraParameters(LoraLayer):
    """A module some of whose parameters have low-rank updates (`target_parameters`).

    Attributes:
        lora_parameters: parameter's name → its updates.
    """

    own_modules = ("lora_parameters",)
    own_attributes = ("adapter_state", "scaling", "scaled", "lora_dropout", "variants", "_shown")
    kind: ClassVar[Kind] = "parameter"
    takes_dropout: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False
    rows_differ: ClassVar[bool] = False

    lora_parameters: nn.ModuleDict
    _shown: dict[tuple[str, tuple[str, ...]], Tensor] | None

    @classmethod
    def refusal(cls) -> str:  # noqa: D102
        return (
            ": another adapter adapts parameters of it (target_parameters), so its weight cannot take a "
            "low-rank update as a module; name the weight in target_parameters as well"
        )

    def prepare(self) -> None:  # noqa: D102
        self.lora_parameters = nn.ModuleDict()
        self.scaling, self.scaled, self.lora_dropout, self.variants, self._shown = {}, {}, {}, {}, None

    @staticmethod
    def shapes(module: nn.Module, parameter: str, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B at rank `r` for a parameter of a module."""
        weight = module._parameters[parameter]
        assert weight is not None
        *experts, d_out, d_in = weight.shape
        if experts and is_transposed(module):
            d_out, d_in = d_in, d_out
        total = r * (experts[0] if experts else 1)
        return (total, d_in), (d_out, total)

    def __getattr__(self, name: str) -> Any:
        """The module's attribute; for an adapted parameter, its merged weight."""
        added = self.__dict__["_modules"].get("lora_parameters")
        if added is None or name not in added or self.shard_of(name) is not None:
            return super().__getattr__(name)
        shown = self._shown
        acting = self.adapter_state.active
        if shown is None:
            return added[name].added(self.get_base(name), acting)
        key = name, acting  # another thread may be in the same call for others
        if key not in shown:
            shown[key] = added[name].added(self.get_base(name), acting)
        return shown[key]

    def shows(self, name: str) -> bool:  # noqa: D102
        return name in self.lora_parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward; each adapted parameter is merged once per call.

        Raises:
            StateError: the parameters are split over ranks while it runs.
        """
        split = [name for name in self.lora_parameters if is_sharded(self._parameters[name])]
        if split:
            raise StateError(
                f"{listing(split)} of a {self.base_class.__name__} are split over ranks while it runs "
                "(tensor parallel), and their updates (target_parameters) are not; shard this module with "
                "fully_shard alone"
            )
        self._shown = {}
        try:
            return super(LoraLayer, self).forward(*args, **kwargs)
        finally:
            self._shown = None
            if isinstance(self, nn.RNNBase):  # it keeps what it read, with its graph
                self.__dict__["_flat_weights"] = self._own_weights()

    def _own_weights(self) -> list[Parameter | None]:
        """A recurrent layer's own parameters, in its order."""
        names: list[str] = self._flat_weights_names  # type: ignore[assignment]
        return [self._parameters.get(name) for name in names]

    def __getstate__(self) -> Any:
        """The module's state; a recurrent layer's own reads its weights first, merged, with their graph."""
        state = super().__getstate__()
        return {**state, "_flat_weights": self._own_weights()} if isinstance(self, nn.RNNBase) else state

    def add_parameter(self, name: str, parameter: str, A: Parameter, B: Parameter, scale: float) -> None:
        """Add an adapter's factors for a parameter."""
        if parameter not in self.lora_parameters:
            weight = self.get_base(parameter)
            experts = weight.shape[0] if weight.dim() == 3 else None
            # A ModuleDict refuses names that are the module's own attributes; a parameter's may be "keys".
            self.lora_parameters.add_module(parameter, ParameterUpdate(experts, is_transposed(self)))
        update: Any = self.lora_parameters[parameter]
        update.lora_A[name], update.lora_B[name] = Factor.of(A), Factor.of(B)
        update.scaling[name] = self.scaling[name] = scale
        self.lora_dropout[name], self.variants[name] = 0.0, PLAIN

    def remove_factors(self, name: str) -> None:  # noqa: D102
        for parameter, update in list(self._updates()):
            if update.scaling.pop(name, None) is not None:
                del update.lora_A[name], update.lora_B[name]
            if not update.scaling:
                del self.lora_parameters[parameter]
        del self.scaling[name], self.lora_dropout[name], self.variants[name]
        self.scaled.pop(name, None)

    def holders(self, name: str) -> list[tuple[str, str, Any]]:
        """As `LoraLayer.holders`; PEFT's wrappers lie one in another, the last parameter's outermost."""
        present = [(p, update) for p, update in self._updates() if name in update.scaling]
        depths = range(len(present) - 1, -1, -1)
        return [
            (".base_layer" * depth, f".lora_parameters.{parameter}", update)
            for depth, (parameter, update) in zip(depths, present, strict=True)
        ]

    def changed(self, names: Sequence[str]) -> list[str]:  # noqa: D102
        return [leaf for leaf, update in self._updates() if any(name in update.scaling for name in names)]

    def merged_parameters(  # noqa: D102
        self, names: Sequence[str], *, out: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        result = {}
        for leaf in self.changed(names):
            W0: Tensor = self.get_base(leaf).detach()
            precision = torch.promote_types(W0.dtype, torch.float32)
            result[leaf] = torch.empty_like(W0, dtype=precision) if out is None else out[leaf]
            update: Any = self.lora_parameters[leaf]
            update.fold(W0, names, precision, out=result[leaf])
        return result

    def lost(self, names: Sequence[str], stored: Mapping[str, Tensor]) -> tuple[float, float]:
        """Squared Frobenius norms of the rounding error and of the updates, in float64."""
        lost = total = 0.0
        for parameter, tensor in stored.items():
            update: Any = self.lora_parameters[parameter]
            weight = self.get_base(parameter).detach().double()
            with torch.no_grad():
                exact = update.added(weight, names)
            lost += float((tensor.detach().double() - exact).square().sum())
            total += float((exact - weight).square().sum())
        return lost, total

    def _updates(self) -> Iterator[tuple[str, Any]]:
        """The adapted parameters in the order in which the module registered them."""
        for parameter in self._parameters:
            if parameter in self.lora_parameters:
                yield parameter, self.lora_parameters[parameter]


def is_transposed(module: nn.Module) -> bool:
    """Whether a module's stacked weights are (experts, d_in, d_out); transformers' modules say so."""
    return bool(getattr(module, "is_transposed", False))
