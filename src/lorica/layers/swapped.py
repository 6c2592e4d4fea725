"""`SwappedModule`: a module whose class is changed in place, and can be changed back.

The module keeps its identity, its parameters, its hooks and its keys in `state_dict`.

    nn.Linear  ──swap──▶  LoraLinear(LoraLayer, nn.Linear)  ──leave──▶  nn.Linear  ──enter──▶  LoraLinear
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import nn
from torch.nn import Parameter

from lorica.errors import StateError
from lorica.state import AdapterState
from lorica.tree import is_sharded

M = TypeVar("M", bound=nn.Module)

_BLANK = vars(nn.Module())
_CONTAINERS = tuple((name, type(value)) for name, value in _BLANK.items() if isinstance(value, (dict, set)))


def blank(cls: type[M]) -> M:
    """A module in the state that `nn.Module.__init__` gives it, at a quarter of the cost.

    Every factor is a module, and a model with a hundred adapters has thousands of them.
    """
    module = cls.__new__(cls)
    state = module.__dict__
    state.update(_BLANK)
    for name, container in _CONTAINERS:
        state[name] = container()
    return module


class Factor(nn.Module):
    """A `weight`, maybe a `bias`: live names are the ecosystem's own, ``query.lora_A.default.weight``."""

    offloaded: ClassVar[type[nn.Module]]
    """Its class while accelerate keeps the values elsewhere."""
    weight: Parameter
    bias: Parameter | None

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign as a module does; a factor that accelerate offloads changes class to fetch its values."""
        super().__setattr__(name, value)
        if name == "_hf_hook":
            object.__setattr__(self, "__class__", self.offloaded)

    @classmethod
    def of(cls, weight: Parameter) -> Self:
        """A factor with this weight, and no bias."""
        factor = blank(cls)
        factor._parameters.update(weight=weight, bias=None)
        return factor


class LayerState(NamedTuple):
    """The state that `leave` took off a module and `enter` puts back, with its mode, device and dtype then.

    Args:
        mixin: the mixin of its class.
        modules: the mixin's modules.
        attributes: the mixin's attributes.
        training: whether the module was in training mode.
        device: device of its first parameter.
        dtype: dtype of its first parameter.
    """

    mixin: type[SwappedModule]
    modules: dict[str, nn.Module]
    attributes: dict[str, Any]
    training: bool
    device: torch.device | None
    dtype: torch.dtype | None


class SwappedModule(nn.Module):
    """A module whose class was changed in place, and can be changed back.

    Subclasses are mixins; `swapped_class` joins one with the module's own class.
    """

    base_class: ClassVar[type[nn.Module]]
    swapped_by: ClassVar[type[SwappedModule]]
    label: ClassVar[str] = "Lora"
    """Prefix of the joined class's name."""
    own_modules: ClassVar[tuple[str, ...]] = ()
    """Child modules that the mixin adds."""
    own_attributes: ClassVar[tuple[str, ...]] = ("adapter_state",)
    """Plain attributes that the mixin adds."""
    outermost: ClassVar[bool] = False
    """Whether this class stays outermost when others join."""

    in_whole: ClassVar[str] = ""
    """Why nothing around such a module can be trained whole; a format with the module's path."""

    adapter_state: AdapterState

    @classmethod
    def refusal(cls) -> str:
        """Why such a module cannot take a low-rank update too: what follows its path; empty if it can."""
        return ""

    @classmethod
    def swap(cls, module: nn.Module) -> Self:
        """Change `module`'s class to this mixin joined with its own."""
        # nn.Module's `__setattr__` would first check at length whether the value is a parameter.
        object.__setattr__(module, "__class__", swapped_class(cls, type(module)))
        assert isinstance(module, cls)
        return module

    @classmethod
    def take(cls, module: nn.Module, state: AdapterState) -> Self:
        """Swap `module`'s class, and add what the mixin needs; it carries no adapter yet."""
        host = cls.swap(module)
        host.__dict__["adapter_state"] = state
        host.prepare()
        return host

    def merged_values(
        self, path: str, names: Sequence[str], shared: dict[Any, Parameter]
    ) -> dict[str, Parameter]:
        """The parameters by name that merging puts into the base, where that is no update of rank r.

        Args:
            path: the module's path.
            names: the adapters to merge.
            shared: the values of the modules asked before, for those that are tied to them.

        Raises:
            AdapterError: a value would hold NaN or infinity.
        """
        return {}

    def prepare(self) -> None:
        """Add the mixin's own modules and attributes, empty."""

    def __delattr__(self, name: str) -> None:
        """Delete an attribute.

        Raises:
            StateError: readers of this parameter see an adapter's value. FSDP1 deletes parameters, and would
                write that value into the base.
        """
        if self._parameters.get(name) is not None and self.shows(name):
            raise StateError(
                f"something (FullyShardedDataParallel?) takes {name} off a {type(self).__name__}, which "
                "shows an adapter's own value there, and would write that into the base; shard with "
                "torch.distributed.fsdp.fully_shard (FSDP2), or leave this module out of the adapter"
            )
        super().__delattr__(name)

    def shows(self, name: str) -> bool:
        """Whether readers of an attribute see another value than the base's parameter of that name."""
        return isinstance(getattr(type(self), name, None), property)

    def shard_of(self, name: str) -> Any:
        """A parameter of which this rank holds a part, as between two passes under `fully_shard`; else None.

        `fully_shard` asks for its parameters by name, and must find them, not what an adapter shows there: it
        would take the sum for the base's own. In a pass it has whole ones in their place.
        """
        own = self.__dict__.get("_parameters", {}).get(name)
        return own if is_sharded(own) and "_is_fsdp_managed_module" in self.__dict__ else None

    def check_own_class(self) -> None:
        """Refuse to swap back a class that something else has changed since.

        Raises:
            StateError: the class is not the joined one; `fully_shard` changes it, for one.
        """
        if type(self) is not swapped_class(self.mixin(), self.base_class):
            raise StateError(
                f"{type(self).__name__} is no class of lorica's: something else (fully_shard?) changed it "
                "since the model was adapted; gather the model first, or do this before sharding"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As a module's. What adapters hold on the meta device comes from there without values: as NaN."""
        bare = [
            (part, leaf)
            for name in self.own_modules
            for part in getattr(self._modules.get(name), "modules", tuple)()
            for leaf, tensor in part._parameters.items()
            if tensor is not None and tensor.is_meta
        ]
        super()._apply(fn, recurse)
        with torch.no_grad():
            for part, leaf in bare:
                tensor = part._parameters[leaf]
                if tensor is not None and not tensor.is_meta and tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        return self

    def leave(self) -> LayerState:
        """Return to the original class; the result lets `enter` undo that."""
        modules = {
            name: module for name in self.own_modules if (module := self._modules.pop(name, None)) is not None
        }
        first = _first_parameter(self)
        state = LayerState(
            self.mixin(),
            modules,
            {name: self.__dict__.pop(name) for name in self.own_attributes},
            self.training,
            None if first is None else first.device,
            None if first is None else first.dtype,
        )
        self.__class__ = self.base_class  # pyright: ignore[reportAttributeAccessIssue]
        return state

    @staticmethod
    def enter(module: nn.Module, state: LayerState) -> None:
        """Undo `leave`, in the mode, device and dtype that the module has now."""
        first = _first_parameter(module)
        if first is not None and (first.device, first.dtype) != (state.device, state.dtype):
            dtype = first.dtype if first.dtype != state.dtype else None
            for own in state.modules.values():
                own.to(first.device, dtype)
        if module.training != state.training:
            for own in state.modules.values():
                own.train(module.training)
        module.__class__ = swapped_class(state.mixin, type(module))
        module._modules.update(state.modules)
        module.__dict__.update(state.attributes)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by mixin and original class, because the joined class cannot be imported by name."""
        return rebuild, (*_unjoined(type(self)),), self.__getstate__()

    @classmethod
    def mixin(cls) -> type[SwappedModule]:
        """The mixin that `swapped_class` joined with the module's own class."""
        return cls.swapped_by


def _first_parameter(module: nn.Module) -> Parameter | None:
    """A module's own first parameter, or that of the first of its parts that has one."""
    # `parameters()` would take longer than the rest of `leave`.
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    parts = (_first_parameter(part) for part in module._modules.values() if part is not None)
    return next((parameter for parameter in parts if parameter is not None), None)


_COMPANIONS: list[tuple[type[SwappedModule], type[SwappedModule]]] = []


def accompany(mixin: type[SwappedModule], companion: type[SwappedModule]) -> None:
    """Have a class stand beside a mixin, and beside those derived from it, in the joined classes."""
    _COMPANIONS.append((mixin, companion))


@functools.cache
def swapped_class(mixin: type[SwappedModule], base: type[nn.Module]) -> type[SwappedModule]:
    """The class that joins a mixin with a module's own class; made once per pair."""
    companions = (companion for known, companion in _COMPANIONS if issubclass(mixin, known))
    return type(
        f"{mixin.label}{base.__name__}",
        (mixin, *companions, base),
        {"base_class": base, "swapped_by": mixin, "__module__": base.__module__},
    )


def rebuild(*mixins_and_base: type[nn.Module]) -> nn.Module:
    """An empty instance of the joined class, for unpickling; the last joined comes first."""
    *mixins, cls = mixins_and_base
    for mixin in reversed(mixins):
        cls = swapped_class(mixin, cls)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _unjoined(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """The mixins of a joined class, the last joined first, and then the module's own class."""
    while issubclass(cls, SwappedModule):
        yield cls.swapped_by
        cls = cls.base_class
    yield cls
