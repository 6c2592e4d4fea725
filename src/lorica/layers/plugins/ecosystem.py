"""PEFT's names on adapted layers, for other libraries: TRL, diffusers, exporters to servers.

    LoraLinear(LoraLayer, AskedLayer, nn.Linear)        `accompany` lets the class stand beside a mixin

No forward calls anything here. An attribute of the module's own class takes precedence over each name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import AdapterError, ConfigError, StateError, listing
from lorica.layers.base import LoraLayer
from lorica.layers.saved import SavedModule
from lorica.layers.swapped import SwappedModule, accompany, blank
from lorica.state import AdapterState

if TYPE_CHECKING:
    from typing import Self

T = TypeVar("T")


class fallback_property(Generic[T]):
    """A read-only property that yields to an attribute of that name on the module's own class."""

    def __init__(self, ask: Callable[[Any], T]) -> None:
        self._ask, self.__doc__ = ask, ask.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, module: None, cls: type) -> Self: ...

    @overload
    def __get__(self, module: nn.Module, cls: type) -> T: ...

    def __get__(self, module: nn.Module | None, cls: type) -> Self | T:
        if module is None:
            return self
        own = getattr(module.base_class, self._name, self)  # the module's own class may know better
        if isinstance(own, fallback_property):
            return self._ask(module)
        return own.__get__(module, cls) if hasattr(own, "__get__") else own


class AskedModule(SwappedModule):
    """A module that adapters changed, with PEFT's names."""

    other_param_names: ClassVar[tuple[str, ...]] = ()
    """Names of its dicts keyed by adapter."""

    @fallback_property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of its containers keyed by adapter."""
        return self.own_modules

    @fallback_property
    def active_adapters(self) -> list[str]:
        """The adapters that act in the model, or would if they were not disabled."""
        return self._chosen()

    @fallback_property
    def active_adapter(self) -> str | list[str]:
        """The adapter that acts; a list unless there is exactly one."""
        names = self._chosen()
        return names[0] if len(names) == 1 else names

    @fallback_property
    def merged_adapters(self) -> list[str]:
        """The adapters merged into this module's weights."""
        return self._in_weights()

    @fallback_property
    def merged(self) -> bool:
        """Whether any adapter is merged into this module's weights."""
        return bool(self._in_weights())

    @fallback_property
    def disable_adapters(self) -> bool:
        """Whether all adapters of the model are disabled."""
        return self.adapter_state.resting is not None

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Let exactly these adapters act in the whole model; of this module's, these train.

        Args:
            adapter_names: a name or several.
            inference_mode: freeze these too.

        Raises:
            AdapterError: no such adapter, or two that cannot act together.
            StateError: an adapter is merged, or brings more than updates, which the model itself must place.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        _choose(self.adapter_state, names)
        for name, parameter in self.brought():
            parameter.requires_grad_(name in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the model's adapters act, or none of them.

        Raises:
            StateError: as `set_adapter`.
        """
        state = self.adapter_state
        if enabled and state.resting is not None:
            names = tuple(name for name in state.resting if name in state.configs)
            _choose(state, names)
            state.resting = None
        elif not enabled and state.resting is None:
            before = state.active
            _choose(state, ())
            state.resting = before

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Let these adapters' part of this module train, or not."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name, parameter in self.brought():
            if name in names:
                parameter.requires_grad_(requires_grad)

    def brought(self) -> Iterator[tuple[str, Parameter]]:
        """The parameters that adapters added to the module, each with its adapter's name."""
        for own in self.own_modules:
            # The adapter's name comes first, but behind the holder's where parameters or rows are adapted.
            place = {"lora_parameters": 2, "token_adapter": 1}.get(own, 0)
            for path, parameter in self._modules[own].named_parameters():  # type: ignore[union-attr]
                yield path.split(".")[place], parameter

    # The module's own attributes may have any of the names above, so the code here uses none of them.

    def _chosen(self) -> list[str]:
        return self._chosen_by_all()

    def _chosen_by_all(self) -> list[str]:
        state = self.adapter_state
        if state.merged:
            return list(state.aside.before)
        return list(state.active if state.resting is None else state.resting)

    def _in_weights(self) -> list[str]:
        return [name for name in self.adapter_state.merged if name in self._get_available_adapters()]

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters that have a part here."""
        return {name for name, _ in self.brought()}

    def _all_available_adapter_names(self) -> list[str]:
        """The same, sorted."""
        return sorted(self._get_available_adapters())


class AskedLayer(AskedModule):
    """An adapted layer, with PEFT's names."""

    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")
    scaling: dict[str, float]
    scaled: dict[str, float]

    @fallback_property
    def base_layer(self) -> nn.Module:
        """The layer without adapters: the same parameters, and its own class's forward."""
        return base_of(self)

    def get_base_layer(self) -> nn.Module:
        """As `base_layer`."""
        return base_of(self)

    @fallback_property
    def in_features(self) -> int:
        """Width of the input."""
        return self._widths()[0]

    @fallback_property
    def out_features(self) -> int:
        """Width of the output."""
        return self._widths()[1]

    @fallback_property
    def r(self) -> dict[str, int]:
        """Adapter → rank."""
        return self._ranks()

    @fallback_property
    def lora_alpha(self) -> dict[str, float]:
        """Adapter → α, from the scale that the adapter was added with."""
        roots = {name: self._rooted(name) for name in self.scaling}
        ranks = {name: rank**0.5 if roots[name] else rank for name, rank in self._ranks().items()}
        return {
            name: _whole(scale / self.scaled.get(name, 1.0) * ranks[name])
            for name, scale in self.scaling.items()
        }

    @fallback_property
    def use_dora(self) -> dict[str, bool]:
        """Adapter → whether it trains magnitudes."""
        return {name: self._holder(name).magnitude_parameter(name) is not None for name in self.scaling}

    @fallback_property
    def use_rslora(self) -> dict[str, bool]:
        """Adapter → whether its scale is α/√r."""
        return {name: self._rooted(name) for name in self.scaling}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """An adapter's ``scale·B·A`` in the layout of W0, in the factors' dtype.

        Raises:
            AdapterError: the adapter has nothing here.
            StateError: the update has another shape than the weight.
        """
        holder: Any = self._holder(adapter)
        shape: Any = self.base_shape if holder is self else None  # type: ignore[attr-defined]
        with torch.no_grad():
            A, _ = holder.factor_parameters(adapter)
            left, right = holder.delta_factors(adapter, A.dtype)
            delta = left @ right * holder.scaling[adapter]
        if shape is not None and delta.numel() != shape.numel():
            raise StateError(
                f"a {self.base_class.__name__} whose update sees every input channel, its weight only a "
                "group's: the update is no change of the weight"
            )
        return delta if shape is None else delta.view(shape)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's own scale, α/r, by `scale`."""
        if adapter in self.scaling:
            self._rescale(adapter, scale / self.scaled.get(adapter, 1.0))

    def scale_layer(self, scale: float) -> None:
        """Multiply the acting adapters' scale."""
        for name in self._chosen() if scale != 1 else ():
            if name in self.scaling:
                self._rescale(name, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the acting adapters' scale; None goes back to α/r."""
        for name in self._chosen():
            if name in self.scaling:
                self._rescale(name, 1 / self.scaled.get(name, 1.0) if scale is None else 1 / scale)

    def merge(self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None) -> None:
        """Refuse: merging is for the whole model."""
        raise StateError("one layer alone is not merged; merge_adapter() or lorica.merge merges the model")

    def unmerge(self) -> None:
        """Refuse, for the same reason."""
        raise StateError(
            "one layer alone is not unmerged; unmerge_adapter() or lorica.restore does the model"
        )

    def _rescale(self, name: str, factor: float) -> None:
        total = self.scaled.get(name, 1.0) * factor
        if not (isinstance(factor, (int, float)) and total == total and abs(total) != float("inf")):
            raise ConfigError(f"the scale of an adapter must be a number, not {factor!r}")
        for _, _, holder in self.holders(name):  # type: ignore[attr-defined]
            if holder is not self:
                holder.scaling[name] *= factor
        self.scaling[name] *= factor
        self.scaled[name] = total

    def _holder(self, name: str) -> Any:
        """The holder of an adapter's factors: the layer, or the one parameter that it adapts."""
        found = self.holders(name) if name in self.scaling else []  # type: ignore[attr-defined]
        if not found:
            raise AdapterError(f"the adapter {name!r} has no update of this {self.base_class.__name__}")
        return found[-1][2]

    def _ranks(self) -> dict[str, int]:
        return {name: self._holder(name).factors(name).r for name in self.scaling}

    def _rooted(self, name: str) -> bool:
        return bool(getattr(self.adapter_state.configs.get(name), "use_rslora", False))

    def _widths(self) -> tuple[int, int]:
        base: Any = self
        if isinstance(self, nn.modules.conv._ConvNd):
            return base.in_channels, base.out_channels
        d_out, d_in = base.base_shape[:2]
        return (d_out, d_in) if base.transposed else (d_in, d_out)


class AskedCopies(AskedModule):
    """A module with copies trained whole, with PEFT's names."""

    modules_to_save: nn.ModuleDict

    @fallback_property
    def original_module(self) -> nn.Module:
        """The original module with its own, frozen parameters."""
        return base_of(self)

    def _chosen(self) -> list[str]:
        return [name for name in self._chosen_by_all() if name in self.modules_to_save]


def _choose(state: AdapterState, names: tuple[str, ...]) -> None:
    """`AdapterState.activate` for a layer, which does not know its model.

    Raises:
        AdapterError: as `activate`.
        StateError: an adapter is merged, or one of those concerned replaces parameters of the base.
    """
    names = tuple(dict.fromkeys(map(state.known, names)))
    if names == state.active:
        return
    state.check_unmerged("choose another adapter")
    placing = [name for name in {*names, *state.active} if state.stand_ins(name)]
    if placing:
        raise StateError(
            f"{listing(map(repr, sorted(placing)))} changes parameters of the base (a start taken out of "
            "it, or trained biases), so a layer alone cannot switch it; call set_adapter on the model, "
            "or lorica.active"
        )
    state.activate(_NOWHERE, names)


_NOWHERE = nn.Module()


def base_of(module: SwappedModule) -> nn.Module:
    """A swapped module in its own class, with the same parameters, buffers and parts.

    Assignments to it reach the module.
    """
    view = blank(module.base_class)
    gone = {*module.own_attributes, *view.__dict__}
    view.__dict__.update({name: value for name, value in module.__dict__.items() if name not in gone})
    view.__dict__.update(_parameters=module._parameters, _buffers=module._buffers, training=module.training)
    parts = {name: part for name, part in module._modules.items() if name not in module.own_modules}
    view.__dict__["_modules"] = parts
    return view


def _whole(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-9 * max(abs(value), 1) else value


accompany(LoraLayer, AskedLayer)
accompany(SavedModule, AskedCopies)
