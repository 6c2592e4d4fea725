"""`BaseTuner`: a model's adapters, those that act, train and are merged, by PEFT's names.

    PeftModel ─base_model─▶ LoraModel ─model─▶ the model itself, adapted in place

It wraps the model only to give parameters PEFT's names (``base_model.model.…``); the adapted model itself
holds its adapters and the choice of the active ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

import lorica
from lorica.choice import names_in
from lorica.config import LoraConfig, full_match
from lorica.errors import AdapterError, LoricaWarning, StateError, listing
from lorica.layers import LoraLayer, LoraParameters, lora_layers, saved_modules
from lorica.layers import LoraLayer as BaseTunerLayer
from lorica.model.merging.merged import behind_merge, finalize, stay_adapted
from lorica.model.merging.plugins.ties import Ties
from lorica.peft.utils.integrations import to_meta
from lorica.peft.utils.other import (
    check_alone,
    check_one_bias,
    check_rows_apart,
    named_whole,
    put_again,
    say_untied,
    without_idle,
)
from lorica.pieces.plugins.blocks import block_of
from lorica.state import AdapterState, adapted, find_adapted
from lorica.tree import parameter_at

__all__ = ["BaseTuner", "BaseTunerLayer", "cast_adapter_dtype", "check_target_module_exists"]


class BaseTuner(nn.Module):
    """A model that carries LoRA adapters, under PEFT's names.

    Args:
        model: the base; adapted in place.
        config: the adapter's configuration, or a map from `adapter_name` to it. None takes a model that
            already carries adapters.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: leave the adapter on the meta device until its values are loaded.

    Raises:
        TargetError: a pattern matches nothing, or a module that cannot be adapted.
        AdapterError: the name is taken or not valid.
    """

    prefix = "lora_"
    tuner_layer_cls = LoraLayer

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | Mapping[str, LoraConfig] | None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        if isinstance(config, Mapping):
            config = config[adapter_name]
        if config is not None:
            whole = named_whole(model, without_idle(model, config))
            put_again(model, adapter_name, lambda name: lorica.adapt(model, whole, name))
            if low_cpu_mem_usage:
                to_meta(model, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Other attributes are the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # before __init__, as copy and pickle ask
                raise
            return getattr(self.model, name)

    @property
    def _resting(self) -> tuple[str, ...] | None:
        """Names of the disabled adapters, which act again once enabled."""
        return self.adapter_state.resting

    @_resting.setter
    def _resting(self, names: tuple[str, ...] | None) -> None:
        self.adapter_state.resting = names

    @property
    def adapter_state(self) -> AdapterState:
        """The state of the model's adapters; an empty one if it carries none."""
        found = find_adapted(self.model)
        return found[1] if found else AdapterState()

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name → configuration."""
        # This API puts LoRA alone on a model.
        return cast(dict[str, LoraConfig], self.adapter_state.configs)

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that an adapter targets, in the model's order."""
        return list(_layers(self.model, parameters=False))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the parameters that an adapter targets by `target_parameters`."""
        found = _layers(self.model, parameters=True)
        return [f"{path}.{leaf}" for path, layer in found.items() for leaf in layer.lora_parameters]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, also while they are disabled."""
        if self._resting is not None:
            return list(self._resting)
        state = self.adapter_state
        return list(state.aside.before if state.merged else state.active)

    @property
    def active_adapter(self) -> list[str]:
        """As `active_adapters`; may be assigned, which leaves `requires_grad` as it is."""
        return self.active_adapters

    @active_adapter.setter
    def active_adapter(self, names: str | Sequence[str]) -> None:
        self._act(names_in(names))

    @property
    def first_active(self) -> str:
        """The active adapter, or the first of several.

        Raises:
            StateError: no adapter is active.
        """
        names = self.active_adapters
        if not names:
            have = listing(map(repr, self.peft_config)) or "none"
            raise StateError(f"no adapter acts; the model has: {have}. set_adapter(name) has one act")
        return names[0]

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the merged adapters."""
        return list(self.adapter_state.merged)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let exactly these adapters act; they train, and the others do not.

        Args:
            adapter_name: a name, or several names; their updates add up.
            inference_mode: freeze these too.

        Raises:
            AdapterError: no such adapter, or two that cannot act together.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._act(names)
        for name in self.adapter_state.configs:
            self.set_requires_grad(name, name in names and not inference_mode)

    def _act(self, names: tuple[str, ...]) -> None:
        for name in names:
            self.adapter_state.known(name)
        if self.adapter_state.merged:
            warnings.warn(
                "the model is merged; it is unmerged first, to let another adapter act",
                LoricaWarning,
                stacklevel=2,
            )
            lorica.restore(self.model)
        resting = self._resting
        check_alone(self.model, self.adapter_state, names)
        lorica.active(self.model, names)  # while disabled too: it refuses those that cannot act together
        if resting is not None:
            lorica.disabled(self.model)
            self._resting = names
        self._choose_for_all()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or not.

        Raises:
            AdapterError: no such adapter.
        """
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.adapter_state.known(name)
            with behind_merge(self.model):
                for parameter in self.adapter_state.parameters_of(name):
                    parameter.requires_grad_(requires_grad)

    def disable_adapter_layers(self) -> None:
        """Let no adapter act until `enable_adapter_layers`; merged adapters are unmerged."""
        if self._resting is None and self.adapter_state.configs:
            active = tuple(self.active_adapters)
            if self.adapter_state.merged:
                lorica.restore(self.model)
            lorica.disabled(self.model)
            self._resting = active
            self._choose_for_all()

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        if self._resting is not None:
            names, self._resting = self._resting, None
            lorica.active(self.model, [name for name in names if name in self.adapter_state.configs])
            self._choose_for_all()

    def _choose_for_all(self) -> None:
        """Let a choice hold for the model in every thread, as in PEFT, whichever thread made it."""
        self.adapter_state.decide(self.adapter_state.last, for_all=True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; if it acted alone, the first that is left acts.

        Raises:
            AdapterError: no such adapter.
            StateError: it is merged.
        """
        state, merged = self.adapter_state, self.merged_adapters
        if adapter_name not in state.configs:
            have = listing(map(repr, state.configs)) or "none"
            raise AdapterError(f"Adapter {adapter_name} does not exist; the model has: {have}")
        if adapter_name in merged:
            raise StateError(
                f"Cannot delete adapter(s) [{adapter_name!r}] while they are merged. Please unmerge them "
                "first."
            )
        if merged:
            lorica.restore(self.model)
            lorica.detach(self.model, adapter_name)
            lorica.merge(self.model, merged, into="quantized")
            stay_adapted(self.model)
            return
        active = [name for name in self.active_adapters if name != adapter_name]
        acted = adapter_name in self.active_adapters
        lorica.detach(self.model, adapter_name)
        if self._resting is not None:
            self._resting = tuple(active) if state.configs else None
        if acted and not active and state.configs:
            first = next(iter(state.configs))
            warnings.warn(
                f"{adapter_name!r} acted and is deleted; now {first!r} acts", LoricaWarning, stacklevel=2
            )
            self.set_adapter(first)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the weights; `unmerge_adapter` brings W0 back bit for bit.

        A quantized layer's weight is packed again, as in PEFT; `lorica.merge` can also unpack it.

        Args:
            adapter_names: names of the adapters; None takes the active ones. Merged ones stay merged.
            safe_merge: accepted without effect: a weight that would hold NaN is always refused.

        Raises:
            StateError: a layer cannot take its update; the model is untouched.
            AdapterError: no such adapter, or a weight would hold NaN or infinity; likewise.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        merged = self.merged_adapters
        new = [self.adapter_state.known(name) for name in names if name not in merged]
        if not new:
            if merged:
                what = f"All adapters are already merged, nothing to do: {listing(map(repr, merged))}"
                warnings.warn(what, LoricaWarning, stacklevel=2)
            return
        check_rows_apart(self.adapter_state, [*merged, *new])
        resting, self._resting = self._resting, None
        try:
            if merged:
                lorica.restore(self.model)
            elif resting is not None:
                lorica.active(self.model, resting)
            lorica.merge(self.model, [*merged, *new], into="quantized")
            stay_adapted(self.model)
        except Exception as error:
            if merged:
                lorica.merge(self.model, merged, into="quantized")
                stay_adapted(self.model)
            elif resting is not None:
                lorica.disabled(self.model)
                self._resting = resting
            if isinstance(error, AdapterError) and "NaN" in str(error):
                raise AdapterError(
                    f"NaNs detected in the merged weights. The adapter {listing(new)} seems to be broken: "
                    f"{error}"
                ) from error
            raise

    def unmerge_adapter(self) -> None:
        """Take the merged adapters out again: W0 is back bit for bit."""
        if self.adapter_state.merged:
            lorica.restore(self.model)
        else:
            warnings.warn("nothing is merged, so there is nothing to unmerge", LoricaWarning, stacklevel=2)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Merge adapters into the weights for good.

        Args:
            progressbar: accepted without effect.
            safe_merge: accepted without effect: a weight that would hold NaN is always refused.
            adapter_names: names of the adapters; None takes the active ones.

        Returns:
            The model itself, as before any adapter, with the merged weights.

        Raises:
            StateError: as `merge_adapter`, or there is nothing to merge.
            AdapterError: as `merge_adapter`.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        if not set(names) <= set(self.merged_adapters):
            self.merge_adapter(names)
        if not self.adapter_state.merged:
            raise StateError("no adapter is active; say which to merge, or call unload()")
        steps = self.adapter_state.aside.steps
        by_merge = any(isinstance(step, Ties) and step.config is not None for step in steps)
        say_untied(self.model, by_merge=by_merge)
        return finalize(self.model)

    def unload(self) -> nn.Module:
        """Take all adapters off.

        Returns:
            The model as it was before: classes, weights, keys and `requires_grad`.
        """
        if self.adapter_state.configs:
            if self.adapter_state.merged:
                lorica.restore(self.model)
            lorica.detach(self.model)
        self._resting = None
        return self.model

    def inject_adapter(self, config: LoraConfig, adapter_name: str, low_cpu_mem_usage: bool = False) -> None:
        """Add an adapter, which neither acts nor trains; the others stay as they are.

        Raises:
            AdapterError: the name is taken or not valid.
            ConfigError: it trains biases of the base, and another adapter does too.
            TargetError: a pattern matches nothing, or a module that cannot be adapted.
        """
        if adapter_name in self.adapter_state.configs:
            raise AdapterError(
                f"Adapter with name {adapter_name!r} already exists; give another name, or "
                f"delete_adapter({adapter_name!r}) first"
            )
        check_one_bias(config, self.peft_config)
        before, resting = self.adapter_state.active, self._resting
        lorica.adapt(self.model, named_whole(self.model, without_idle(self.model, config)), adapter_name)
        lorica.active(self.model, before)
        self._resting = resting
        self.set_requires_grad(adapter_name, False)
        if low_cpu_mem_usage:
            to_meta(self.model, adapter_name)

    def get_model_config(self, model: nn.Module) -> dict[str, Any]:
        """The base's configuration as a dict."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _layers(model: nn.Module, *, parameters: bool) -> dict[str, Any]:
    """Path → adapted layer; only layers with adapted parameters, or only the others."""
    with behind_merge(model):
        found = lora_layers(model)
    return {path: layer for path, layer in found.items() if isinstance(layer, LoraParameters) == parameters}


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Give an adapter's updates, and its copies of whole modules, the base's dtype.

    Args:
        model: the base.
        adapter_name: of the adapter.
        autocast_adapter_dtype: leave them in float32.
    """
    name = adapter_name
    if autocast_adapter_dtype:
        return
    for layer in lora_layers(model).values():
        for _, live, holder in layer.holders(name) if name in layer.scaling else ():
            weight = layer._parameters.get(live.rpartition(".")[2] or layer.weight_name)
            more = (holder.magnitude_parameter(name), holder.bias_parameter(name))
            for parameter in (*holder.factor_parameters(name), *more):
                if parameter is not None and weight is not None and weight.is_floating_point():
                    parameter.data = parameter.data.to(weight.dtype)
    state = adapted(model)[1]
    for piece in state.pieces[name]:
        if piece.master:
            for path, tensor in piece.stand_ins(name).items():
                tensor.data = tensor.data.to(state.dtype_now(state.base_tensor(model, path)))
    for module in saved_modules(model).values():
        if name in module.masters:
            for path, parameter in module.modules_to_save[name].named_parameters():
                parameter.data = parameter.data.to(parameter_at(module, path).dtype)


def check_target_module_exists(config: LoraConfig, key: str) -> bool:
    """Whether a configuration adapts the module of this path, judged by names.

    Args:
        config: its `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern` decide.
        key: path of the module.
    """
    if _named(config.exclude_modules, key) or not _named(config.target_modules, key):
        return False
    layers = config.layers_to_transform
    if layers is None or key in (config.target_modules or ()):
        return True
    holders = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    index = block_of(key, holders)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _named(names: Any, key: str) -> bool:
    if isinstance(names, str):
        return full_match(names, key)
    return any(f".{key}".endswith(f".{name}") for name in names or ())
