"""An adapter on its way out of a `PeftModel`."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorica
from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.config import LoraConfig
from lorica.errors import AdapterError, ConfigError, lines, listing
from lorica.model.merged import behind_merge
from lorica.model.structure import adapted
from lorica.model.vocabulary import is_resized, with_tables
from lorica.state import as_uncompiled

# What wrapping and data parallelism put into a name.
_WRAPPERS = re.compile(r"^(?:module\.)*base_model\.model\.")


def outgoing(
    model: nn.Module,
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = "auto",
) -> Adapter:
    """An adapter as it is saved; also while it is merged.

    Args:
        model: wrapped or not.
        name: of the adapter.
        state_dict: take the values from here, by their live names.
        save_embedding_layers: whether to add the embedding tables of the base: True, False, or "auto", where
            they have other rows than the base's own configuration says.

    Raises:
        AdapterError: no such adapter; or `state_dict` lacks what trains of it, or holds it in another shape.
        ConfigError: `save_embedding_layers` is something else.
    """
    root, _ = adapted(model)
    gathered = None if state_dict is None else _Gathered(state_dict)
    with behind_merge(root):
        adapter = lorica.extract(root, name, state_dict=gathered)
        if gathered is not None:
            gathered.check(name, root)
    if save_embedding_layers not in (True, False, "auto"):
        raise ConfigError(f'save_embedding_layers is True, False or "auto", not {save_embedding_layers!r}')
    if save_embedding_layers is True or (save_embedding_layers == "auto" and is_resized(root)):
        adapter = with_tables(adapter, root)
    return dataclasses.replace(adapter, config=_telling_base(adapter.lora, root))


class _Gathered(dict[str, Tensor]):
    """Values by their live names, as sharded training gathers them; it notes what it is asked for."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__({_WRAPPERS.sub("", as_uncompiled(key)): value for key, value in state_dict.items()})
        self._live: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """An empty one is asked too."""
        return True

    def get(self, key: str, default: Any = None) -> Any:
        """The value of that name, or else the live one."""
        self._live[key] = default
        return super().get(key, default)

    def check(self, adapter: str, root: nn.Module) -> None:
        """Refuse values that are not the adapter's.

        What is frozen may be missing: DeepSpeed leaves it out. A shard is flat or empty, and says no shape.

        Raises:
            AdapterError: with the whole list.
        """
        live = (as_uncompiled(name) for name, _ in root.named_parameters())
        of_model = not self.keys().isdisjoint(live)
        problems = [
            f"missing: {key}"
            for key, live in self._live.items()
            if key not in self and (live.requires_grad or not of_model)
        ]
        problems += [
            f"shape of {key}: {tuple(self[key].shape)}, on the model {tuple(live.shape)}"
            for key, live in self._live.items()
            if key in self and live.dim() > 1 and live.numel() and self[key].shape != live.shape
        ]
        if problems:
            raise AdapterError(
                f"state_dict should hold the values of the adapter {adapter!r} by their names in "
                f"model.state_dict(), and has {listing(list(self)[:3]) or 'nothing'}, ...:\n{lines(problems)}"
            )


def _telling_base(config: LoraConfig, root: nn.Module) -> LoraConfig:
    """The configuration with the base's class in it, where no task says how to load it."""
    if config.task_type is None and getattr(config, "auto_mapping", ()) is None:
        mapping = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
        return config.replace(auto_mapping=mapping)
    return config


def on_untouched_base(adapter: Adapter, before: str | os.PathLike[str]) -> Adapter:
    """What training added to the base as it was, where the adapter's start changed the base.

        W + ΔW = W_res + s·B·A   and   W = W_res + s·B₀·A₀   give   ΔW = s·[B  −B₀]·[A; A₀]

    Args:
        adapter: as trained.
        before: folder with the adapter as it started.

    Raises:
        AdapterError: the two are not of one make.
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
