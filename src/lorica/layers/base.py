"""`LoraLayer`: the factors of an adapted layer, and all that is computed from them.

Each kind of layer is a small subclass; `SwappedModule` joins it with the module's own class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica import functional
from lorica.adapter import Factors, Kind
from lorica.errors import StateError, TargetError
from lorica.folding import fold
from lorica.layers.swapped import Factor, SwappedModule, blank
from lorica.layers.variants import PLAIN, VARIANTS, Variant
from lorica.tree import Place


class LoraLayer(SwappedModule):
    """A layer with one low-rank update per adapter beside its weight.

    Attributes:
        lora_A: adapter name → down-projection.
        lora_B: adapter name → up-projection.
        scaling: adapter name → α/r or α/√r.
        scaled: adapter name → the factor by which its scale was multiplied since it was added.
        lora_magnitude_vector: adapter name → trained magnitude per output (DoRA only).
        lora_dropout: adapter name → dropout probability.
        variants: adapter name → the variant that forms its output and its weight.
        displaced: the acting adapter that replaced W0 by its own weight, and W0; None while W0 is in place.
        blocks: where the factors lie side by side (`lorica.layers.rows`); None before a mixture.
    """

    own_modules = ("lora_A", "lora_B", "lora_magnitude_vector")
    own_attributes = ("adapter_state", "scaling", "scaled", "lora_dropout", "variants", "displaced", "blocks")
    in_whole: ClassVar[str] = "another adapter adapts {} in it"
    kind: ClassVar[Kind] = "linear"
    weight_name: ClassVar[str] = "weight"
    """Name of the adapted parameter."""
    transposed: ClassVar[bool] = False
    """Whether that parameter has the layout (d_in, d_out)."""
    takes_dropout: ClassVar[bool] = True
    """Whether dropout can act: the update has an input of its own."""
    takes_bias: ClassVar[bool] = True
    """Whether B can have a bias."""
    rows_differ: ClassVar[bool] = True
    """Whether each row of a batch can have its own adapter."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of other parameters of the base that its forward reads."""
    packed: ClassVar[bool] = False
    """Whether the weight is packed in a way that can be read and written."""
    opaque: ClassVar[bool] = False
    """Whether the weight is packed, or the forward does more than multiply by it."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    scaling: dict[str, float]
    scaled: dict[str, float]
    lora_dropout: dict[str, float]
    variants: dict[str, Variant]
    displaced: tuple[str, Parameter] | None
    blocks: Any = None

    def prepare(self) -> None:  # noqa: D102
        self._modules.update({name: blank(nn.ModuleDict) for name in self.own_modules})
        self.__dict__.update(scaling={}, scaled={}, lora_dropout={}, variants={}, displaced=None, blocks=None)

    @classmethod
    def check_place(cls, place: Place) -> None:
        """Refuse a module of this kind on which an update would have no effect or a wrong one.

        Raises:
            TargetError: naming the module and the remedy.
        """
        path, module, _ = place
        weight = module._parameters.get(cls.weight_name)
        if weight is not None and weight.is_complex():
            raise TargetError(
                f"{path}: its weight is {weight.dtype}, and lorica's updates are real; leave it out"
            )
        if weight is None and (isinstance(module, nn.Linear) or not cls.opaque):
            raise TargetError(
                f"{path}: its {cls.weight_name} is computed (weight_norm, parametrize), so there is no "
                "parameter to update; remove the parametrization first"
            )
        for leaf in cls.reads:
            if leaf not in module._parameters:
                raise TargetError(
                    f"{path}: its {leaf} is computed (prune, parametrize), so the adapted layer has none to "
                    "read; make it a parameter first (torch.nn.utils.prune.remove, remove_parametrizations)"
                )

    @classmethod
    def has_rows(cls, module: nn.Module) -> bool:
        """Whether the rows of the module's W0 can be read, as DoRA must."""
        weight = module._parameters.get(cls.weight_name)
        return weight is not None and weight.is_floating_point()

    @classmethod
    def factor_shapes(cls, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank `r`, for a module of this kind or one that may become so.

        Raises:
            TargetError: the module cannot carry such an update.
        """
        d_out, d_in = module._parameters[cls.weight_name].shape  # type: ignore[union-attr]
        if cls.transposed:
            d_out, d_in = d_in, d_out
        return (r, d_in), (d_out, r)

    @classmethod
    def anchor(cls, module: nn.Module) -> Tensor | None:
        """The tensor that decides the update's device and precision: W0."""
        return module._parameters[cls.weight_name]

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        """A weight in this kind's layout, as (d_out, d_in)."""
        return weight.t() if cls.transposed else weight.flatten(1)

    @property
    def base_weight(self) -> Tensor:
        """W0 as stored, or the weight by which an acting adapter replaced it."""
        weight = self._parameters.get(self.weight_name)
        return self.computed(self.weight_name) if weight is None else weight

    def computed(self, leaf: str) -> Tensor:
        """The present value of a parameter that became a computed one (prune, weight_norm)."""
        value = self.__dict__.get(leaf)
        return super().__getattribute__(leaf) if value is None else value

    def weight_beside(self, name: str) -> Tensor | None:
        """W0, if another adapter replaced it; None if the layer holds the weight this adapter trained beside.

        DoRA rescales the weight that it was trained beside. Another adapter's replacement of W0 is that
        adapter's own effect, and is added to it.
        """
        if self.displaced is None or self.displaced[0] == name:
            return None
        stands = self.base_weight
        return self.displaced[1].to(device=stands.device, dtype=stands.dtype)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base layer's output for `x` with another weight in its own layout, and no bias."""
        raise StateError(
            f"{self.base_class.__name__} has a forward of its own, and one adapter replaces its weight; "
            "another that rescales its rows (DoRA) cannot act beside that"
        )

    def get_base(self, leaf: str) -> Parameter:
        """A parameter of the base by its name."""
        parameter = self._parameters[leaf]
        assert parameter is not None
        return parameter

    @property
    def base_shape(self) -> torch.Size:
        """Shape of W0."""
        return self.base_weight.shape

    @property
    def precision(self) -> torch.dtype:
        """The dtype of sums with W0: float32, or W0's higher precision."""
        return torch.promote_types(self.base_weight.dtype, torch.float32)

    def base_rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of W0 in its own layout as a matrix, in its own dtype or another; read only."""
        weight = self.base_weight.detach()[rows].flatten(1)
        return weight if dtype is None else weight.to(dtype)

    def rows_beside(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """As `base_rows`, for the weight that an adapter was trained beside."""
        own = self.weight_beside(name)
        return self.base_rows(rows, dtype) if own is None else own.detach()[rows].flatten(1).to(dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' updates."""
        names = self.acting()
        y = self.base_forward(*args, **kwargs)
        x = args[0] if args else kwargs[_input_name(self.base_class)]
        if self.adapter_state.rows is not None:
            return self.adapter_state.rows.add(self, y, x, self.scaling.keys(), self.effect)
        base = y
        for name in names:
            y = y + self.effect(name, x, base)
        return y

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output."""
        return super().forward(*args, **kwargs)

    def effect(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        """The addition of one adapter to `base`, the base layer's output for `x`."""
        return self.variants[name].effect(self, name, x, base)

    def update(self, name: str, x: Tensor) -> Tensor:
        """One adapter's ``scale·B·A·x``, with dropout in training."""
        raise NotImplementedError

    def acting(self) -> list[str]:
        """Names of the active adapters that have an update for this layer."""
        if self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.adapter_state.see()
        return [name for name in self.adapter_state.active if name in self.scaling]

    def update_of(self, name: str) -> tuple[Tensor, Tensor, float, float]:
        """A, B, scale, and the dropout probability in force now (0 in evaluation)."""
        p = self.lora_dropout[name] if self.training else 0.0
        return (*functional.evened(*self.factor_parameters(name), self.scaling[name]), p)

    def factor_parameters(self, name: str) -> tuple[Parameter, Parameter]:
        """The adapter's A and B."""
        A, B = self._factor("lora_A", name), self._factor("lora_B", name)
        assert A is not None
        assert B is not None
        return A.weight, B.weight

    @classmethod
    def factor_names(cls, name: str) -> tuple[str, str]:
        """Names of the adapter's A and B among this module's parameters."""
        return f"lora_A.{name}.weight", f"lora_B.{name}.weight"

    def magnitude_parameter(self, name: str) -> Parameter | None:
        """The adapter's magnitudes (d_out,), if it has any."""
        magnitude = self._factor("lora_magnitude_vector", name)
        return None if magnitude is None else magnitude.weight

    def bias_parameter(self, name: str) -> Parameter | None:
        """The bias (d_out,) on the adapter's B, if it has one."""
        B = self._factor("lora_B", name) if self.takes_bias else None
        return None if B is None else B.bias

    def _factor(self, own: str, name: str) -> Factor | None:
        # Read from nn.Module's tables: attribute access would take a tenth of a small layer's time.
        return self._modules[own]._modules.get(name)  # type: ignore[union-attr, return-value]

    @classmethod
    def row_norm(
        cls, module: nn.Module, A: Tensor, B: Tensor, scale: float, weight: Tensor | None = None
    ) -> Tensor:
        """Euclidean norm of each row of ``W0 + scale·B·A`` (d_out,), in A's dtype.

        Args:
            module: a module of this kind, or one that may become so.
            A: (r, d_in).
            B: (d_out, r).
            scale: factor of the product.
            weight: replaces W0, in its layout; None takes the module's present weight.
        """
        if weight is None:
            weight = module._parameters.get(cls.weight_name)
            weight = getattr(module, cls.weight_name) if weight is None else weight
        assert isinstance(weight, Tensor)
        # float64 serves to measure rounding; otherwise the product with W0 stays in W0's dtype.
        weight = weight.to(A.dtype) if A.dtype == torch.float64 else weight
        return functional.row_norm(cls.as_matrix(weight), A, B, scale)

    def holders(self, name: str) -> list[tuple[str, str, Any]]:
        """The holders of an adapter's factors: key and live name after this module's path, and the holder."""
        return [("", "", self)]

    def add_factors(self, name: str, A: Parameter, B: Parameter, scale: float, dropout: float) -> None:
        """Add an adapter's factors, in place of any of the same name."""
        self.lora_A._modules[name], self.lora_B._modules[name] = Factor.of(A), Factor.of(B)
        self.scaling[name], self.lora_dropout[name], self.variants[name] = scale, dropout, PLAIN

    def add_magnitude(self, name: str, magnitude: Parameter) -> None:
        """Add an adapter's magnitudes."""
        self.lora_magnitude_vector._modules[name] = Factor.of(magnitude)
        self.variants[name] = VARIANTS["dora"]

    def add_bias(self, name: str, bias: Parameter) -> None:
        """Add the bias on an adapter's B."""
        self.lora_B[name].bias = bias
        self.variants[name] = VARIANTS["biased"]

    def remove_factors(self, name: str) -> None:
        """Remove an adapter's factors and magnitudes."""
        for own in self.own_modules:
            if name in getattr(self, own):
                del getattr(self, own)[name]
        del self.scaling[name], self.lora_dropout[name], self.variants[name]
        self.scaled.pop(name, None)
        if self.blocks is not None:
            self.blocks.drop(name)

    def factors(self, name: str) -> Factors:
        """The adapter's update as a value that shares memory with the parameters."""
        A, B = self.factor_parameters(name)
        magnitude = self.magnitude_parameter(name)
        m = None if magnitude is None else magnitude.detach()
        bias = self.bias_parameter(name)
        b = None if bias is None else bias.detach()
        return Factors(A.detach(), B.detach(), self.scaling[name], self.kind, m, b)

    def check_mergeable(self) -> None:
        """Refuse a layer whose weight has no place for an update.

        Raises:
            StateError: the weight is packed, or the update is no change of the weight.
        """

    def storing(self, leaf: str, value: Tensor) -> dict[str, Any]:
        """The base's attributes that store `value`, a result of `merged_parameters`, under the name `leaf`.

        Raises:
            StateError: the weight is packed in a way that can only be read.
        """
        return {leaf: Parameter(value.to(self.get_base(leaf).dtype), requires_grad=False)}

    def stored(self, attributes: Mapping[str, Any]) -> Tensor:
        """The weight in what `storing` returned, as plain numbers."""
        return attributes[self.weight_name]

    def check_bias(self, names: Sequence[str]) -> None:
        """Refuse to merge a trained bias into a layer that has none.

        Raises:
            StateError: it has none.
        """
        trained = any(self.bias_parameter(name) is not None for name in names)
        if trained and self._parameters.get("bias") is None:
            raise StateError(
                f"the bias on B (lora_bias) has no place in a {self.base_class.__name__} without a bias; use "
                "the adapter unmerged"
            )

    def changed(self, names: Sequence[str]) -> list[str]:
        """Names of the base's parameters that merging these adapters changes."""
        shifted = any(self.bias_parameter(name) is not None for name in names)
        return [self.weight_name, "bias"] if shifted else [self.weight_name]

    def lost(self, names: Sequence[str], stored: Mapping[str, Tensor]) -> tuple[float, float] | None:
        """Squared norms of a merge's rounding error and of its updates; None where only the weight changes.

        Args:
            names: the merged adapters.
            stored: name of a parameter → its merged values.
        """
        return None

    def merged_parameters(
        self, names: Sequence[str], *, out: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Merge adapters into the base's parameters: name, as in `changed`, → merged values.

        Args:
            names: adapters to add; those without an update here add nothing.
            out: name → tensor to write to; its values are rounded once to its dtype.

        Returns:
            Those tensors; without `out`, new ones in float32 or the parameter's higher precision.
        """
        into = out or {}
        result = {self.weight_name: self.fold(names, out=into.get(self.weight_name))}
        variants = ((name, self.variants.get(name, PLAIN)) for name in names)
        found = [variant.shift(self, name) for name, variant in variants if variant is not PLAIN]
        shifts = [shift.detach() for shift in found if shift is not None]
        if shifts:
            bias = self.get_base("bias").detach()
            total = bias.to(torch.promote_types(bias.dtype, torch.float32)) + torch.stack(shifts).sum(0)
            result["bias"] = into["bias"].copy_(total) if "bias" in into else total
        return result

    def fold(self, names: Sequence[str], *, out: Tensor | None = None) -> Tensor:
        """``W0 + Σ scale·B·A`` over the named adapters, computed in float32 or W0's higher precision.

        Args:
            names: adapters to add; those without an update here add nothing.
            out: tensor of W0's shape to write to; the sum is rounded once to its dtype.

        Returns:
            The sum in the layout of W0: `out`, or a new tensor in the precision computed in.
        """
        W0, precision = self.base_rows(slice(None)), self.precision
        out = W0.new_empty(self.base_shape, dtype=precision) if out is None else out
        result = out.flatten(1)
        present = [name for name in names if name in self.scaling]
        if len(present) == 1 and not self.variants[present[0]].turns:
            fold(W0, *self.delta_factors(present[0], precision), self.scaling[present[0]], out=result)
        else:
            result.copy_(self._add_up(present, W0.to(precision)))
        if result.data_ptr() != out.data_ptr():  # a layout that cannot be flattened in place
            out.copy_(result.view(out.shape))
        return out

    def _add_up(self, names: Sequence[str], W0: Tensor) -> Tensor:
        """W0 with the delta weights of several adapters, in W0's dtype."""
        result, everything = W0, slice(None)
        for name in names:
            left, right = self.delta_factors(name, W0.dtype)
            variant = self.variants[name]
            if not variant.turns:
                result = fold(result, left, right, self.scaling[name])
            else:
                own = self.rows_beside(name, everything, W0.dtype)
                folded = fold(own, left, right, self.scaling[name])
                turned = variant.weight(self, name, own, folded, everything).detach()
                result = turned if len(names) == 1 else result + (turned - own)
        return result

    def along_outputs(self, vector: Tensor) -> Tensor:
        """One number per output (d_out,), shaped to multiply the layer's output."""
        return vector

    def along_rows(self, ratio: Tensor) -> Tensor:
        """One number per output (d_out,), shaped to multiply ``W0.flatten(1)``."""
        return ratio if self.transposed else ratio.unsqueeze(1)

    def delta_factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two matrices whose product, times the scale, is the delta weight laid out as ``W0.flatten(1)``."""
        A, B = (factor.detach().to(dtype).flatten(1) for factor in self.factor_parameters(name))
        return (A.t(), B.t()) if self.transposed else (B, A)


@functools.cache
def _input_name(cls: type[nn.Module]) -> str:
    """Name of the first argument of a module's forward after ``self``."""
    return list(inspect.signature(cls.forward).parameters)[1]
