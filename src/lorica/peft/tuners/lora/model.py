"""`LoraModel`, which is `model.base_model`: combining adapters, an adapter per row of a batch."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import lorica
from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.algebra import combine
from lorica.algebra.combination import METHODS
from lorica.config import LoraConfig
from lorica.errors import AdapterError, ConfigError, LoricaWarning, StateError, listing
from lorica.layers import lora_layers
from lorica.model.adapt import attach_finite, open_for
from lorica.model.merging.merged import behind_merge
from lorica.peft.tuners.lora.layer import module_type
from lorica.peft.tuners.tuners_utils import BaseTuner
from lorica.peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)


class LoraModel(BaseTuner):
    """A model that carries LoRA adapters; arguments as of `BaseTuner`."""

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | Mapping[str, LoraConfig] | None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__(model, config, adapter_name, low_cpu_mem_usage)
        if config is not None:
            warn_of_bias(model, self.peft_config[adapter_name], adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter made of others; it neither acts nor trains.

        Args:
            adapters: names of the adapters to combine.
            weights: of each; may be negative.
            adapter_name: name of the result.
            combination_type: see `lorica.algebra.combine`; a single adapter is only scaled.
            svd_rank: rank of the result, for the types that end in "svd"; None takes the parts' highest.
            svd_clamp: quantile at which the factors of an SVD are clamped.
            svd_full_matrices: accepted without effect: the added matrices would be cut off again.
            svd_driver: for torch.linalg.svd on CUDA.
            density: share of entries that pruning keeps.
            majority_sign_method: "total" or "frequency": how TIES elects a sign.

        Raises:
            AdapterError: the name is taken, or this type cannot combine the parts.
            ConfigError: there is no such type, or it does not take a given option.
            StateError: an adapter is merged.
        """
        # A name that is taken is refused before the work.
        open_for(self.model, adapter_name, trainable=False)
        with behind_merge(self.model):
            parts = [lorica.extract(self.model, self.adapter_state.known(name)) for name in adapters]
        method = "linear" if len(parts) == 1 else combination_type
        options: dict[str, Any] = {
            "density": density,
            "majority_sign_method": None if majority_sign_method == "total" else majority_sign_method,
            "svd_rank": svd_rank,
            "svd_clamp": svd_clamp,
            "svd_driver": svd_driver,
        }
        # As in PEFT: an option that the type does not take is ignored.
        taken = METHODS.get(method, tuple(options))
        options = {name: value if name in taken else None for name, value in options.items()}
        combined = combine(parts, list(weights), method, **options)
        before, resting = self.adapter_state.active, self._resting
        attach_finite(self.model, combined, adapter_name, trainable=False)
        lorica.active(self.model, before)
        self._resting = resting

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: the adapter is LoRA, and `convert_to_lora` is not carried."""
        return False

    def rows(self, adapter_names: Sequence[str] | None, kwargs: dict[str, Any]) -> Any:
        """A context in which each row of the batch has its own adapter; without names it changes nothing.

        Args:
            adapter_names: one per row; ``"__base__"`` for none.
            kwargs: of the call; `alora_offsets` is removed from it.

        Raises:
            ConfigError: the names are one string, or activated LoRA is requested.
            AdapterError: no such adapter, or a layer cannot take them.
            StateError: an adapter is merged.
        """
        if kwargs.pop("alora_offsets", None) is not None:
            raise ConfigError("alora_offsets: activated LoRA is not carried; train plain LoRA instead")
        if adapter_names is None:
            return nullcontext()
        if isinstance(adapter_names, str):
            raise ConfigError(f"adapter_names takes a name for each row, not one string {adapter_names!r}")
        if self.merged_adapters:
            raise StateError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` "
                "first."
            )
        names = [None if name == "__base__" else name for name in adapter_names]
        missing = sorted({name for name in names if name is not None and name not in self.peft_config})
        if missing:
            have = listing(map(repr, self.peft_config))
            raise AdapterError(
                f"Trying to infer with non-existing adapter(s): {', '.join(missing)}; the model has: {have}"
            )
        if self._resting is not None:  # what is disabled acts on no row
            for name in filter(None, names):
                self.adapter_state.known(name)
            return nullcontext()
        return mixed_rows(self.model, names)


def warn_of_bias(root: nn.Module, config: LoraConfig, name: str) -> None:
    """Warn of layers whose bias on B has no place once they are merged.

    Warns:
        LoricaWarning: naming each.
    """
    for path, layer in lora_layers(root).items() if config.lora_bias else ():
        if name in layer.scaling and layer._parameters.get("bias") is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {layer.base_class.__name__} has "
                f"no bias. This means that merging LoRA weights won't be possible: {path}",
                LoricaWarning,
                stacklevel=4,
            )


def mixed_rows(root: nn.Module, names: Sequence[str | None]) -> lorica.mixed:
    """As `lorica.mixed`, with PEFT's name of the layer in its errors.

    Raises:
        AdapterError: as `lorica.mixed`.
        StateError: likewise.
    """
    try:
        return lorica.mixed(root, names)
    except StateError as error:
        for layer in lora_layers(root).values():
            if not layer.rows_differ and any(name in layer.scaling for name in names):
                kind = module_type(layer)
                raise StateError(f"{kind} does not support mixed adapter batches yet. {error}") from error
        raise


def on_untouched_base(adapter: Adapter, before: str | os.PathLike[str]) -> Adapter:
    """The update of the original base, for an adapter whose start changed the base.

        W + ΔW = W_res + s·B·A   and   W = W_res + s·B₀·A₀   give   ΔW = s·[B  −B₀]·[A; A₀]

    Args:
        adapter: the trained adapter.
        before: folder with the adapter before training.

    Raises:
        AdapterError: the two differ in layers or ranks.
    """
    if adapter.trained_as is not None:
        return adapter  # lorica knows the start itself
    start = checkpoint.read(Path(before))
    same = adapter.factors.keys() == start.factors.keys() and all(
        f.A.shape == start.factors[path].A.shape and f.B.shape == start.factors[path].B.shape
        for path, f in adapter.factors.items()
    )
    if not same:
        raise AdapterError(
            f"{before} is not how this adapter started: it has other layers or ranks; save the adapter there "
            "right after it is made, before training"
        )
    if any(factors.magnitude is not None for factors in adapter.factors.values()):
        raise AdapterError(
            "with DoRA's magnitudes an update is no difference of products, so it cannot be converted"
        )
    factors = {
        path: dataclasses.replace(
            f,
            A=torch.cat([f.A, start.factors[path].A.to(f.A)]),
            B=torch.cat([f.B, -start.factors[path].B.to(f.B)], dim=1),
        )
        for path, f in adapter.factors.items()
    }
    config = adapter.lora
    larger = math.sqrt(2) if config.use_rslora else 2
    config = config.replace(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=larger * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: larger * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return dataclasses.replace(adapter, config=config, factors=factors)
