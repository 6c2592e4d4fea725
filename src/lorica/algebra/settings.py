"""The settings of an adapter made from others, so that its `adapter_config.json` describes it truly."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.adapter import Adapter, Factors
from lorica.config import LoraConfig, exactly
from lorica.config.checks import is_index
from lorica.errors import AdapterError, ConfigError, LoricaWarning, lines, listing

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Settings that only training or its start reads: the default, where adapters differ.
_TRAINING = ("lora_dropout", "init_lora_weights", "ensure_weight_tying", "inference_mode")
# Settings that follow from the updates, from the modules trained whole, or from the base.
_SETTLED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("task_type", "bias", "modules_to_save", "base_model_name_or_path", "revision"),
)

Extras = dict[str, Tensor]
Classes = tuple[str, ...] | None


def describing(config: LoraConfig, factors: Mapping[str, Factors]) -> LoraConfig:
    """The configuration with the rank of each of these updates, and α = r: a scale of 1.

    The commonest rank is `r`; a layer of another rank has a pattern that matches its path alone.
    """
    (r, _), *_ = Counter(f.r for f in factors.values()).most_common(1)
    ranks = {exactly(path): f.r for path, f in factors.items() if f.r != r}
    if config.init_lora_weights == "orthogonal":  # which knows even ranks only
        config = config.replace(init_lora_weights=True)
    return config.replace(r=r, lora_alpha=r, rank_pattern=ranks, alpha_pattern=dict(ranks), use_rslora=False)


def tied(
    config: LoraConfig, factors: Mapping[str, Factors], adapters: Sequence[Adapter]
) -> Mapping[str, Factors]:
    """The factors of an adapter made from others, a head's tied to an embedding's if they are so in all.

    Args:
        config: its `ensure_weight_tying` asks for tied factors.
        factors: module path → the new factors.
        adapters: the adapters they were made from.
    """
    if not config.ensure_weight_tying:
        return factors
    tables = [path for path, f in factors.items() if f.kind == "embedding"]
    made = dict(factors)
    for path in factors.keys() - {*tables}:
        for table in tables:
            sides = [(a.factors.get(path), a.factors.get(table)) for a in adapters]
            sides = [(one, other) for one, other in sides if one is not None or other is not None]
            if all(one and other and one.shares(other) for one, other in sides):
                made[path] = factors[table].transposed()
    return made


def agreed(
    adapters: Sequence[Adapter], paths: Sequence[str], keep: int | None
) -> tuple[LoraConfig, Extras, Classes]:
    """The settings and whole tensors that several adapters agree on, for one with updates at `paths`.

    Args:
        adapters: the adapters.
        paths: of the layers that the result updates.
        keep: index of the adapter to take heads, biases and the task from; None takes them from all, if no
            two differ.

    Returns:
        The configuration, all but its ranks, the tensors trained whole, and the names of the head's classes.

    Raises:
        AdapterError: lists the differences, if `keep` is None or cannot choose.
        ConfigError: `keep` is no index of an adapter.

    Warns:
        LoricaWarning: they name different bases.
    """
    configs = [adapter.lora for adapter in adapters]
    settled = {*_TARGETS, *_TRAINING, *_SETTLED}
    unlike = [
        f.name for f in dataclasses.fields(LoraConfig) if f.name not in settled and not _same(configs, f.name)
    ]
    if unlike:
        raise AdapterError(f"the adapters differ in {listing(unlike)}, and no one adapter can have both")
    extras, settings, classes = _whole(adapters, paths, keep)
    defaults = LoraConfig()
    training = {name: getattr(defaults, name) for name in _TRAINING if not _same(configs, name)}
    config = configs[0].replace(
        **training,
        **settings,
        **_targets(configs, paths),
        **_base(configs),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
    )
    return config, extras, classes


def _whole(
    adapters: Sequence[Adapter], paths: Sequence[str], keep: int | None
) -> tuple[Extras, dict[str, Any], Classes]:
    """The tensors trained whole, the settings that describe them, and the names of the classes."""
    if keep is not None:
        if not is_index(keep) or keep >= len(adapters):
            raise ConfigError(f"keep must be the index of an adapter, 0 to {len(adapters) - 1}, not {keep!r}")
        adapters = [adapters[keep]]
    extras: Extras = {}
    differing: dict[str, str] = {}
    for adapter in adapters:
        for name, tensor in adapter.extras.items():
            if not _equal(extras.setdefault(name, tensor), tensor):
                differing[name] = "other values in each"
    named = list(dict.fromkeys(a.classes for a in adapters if a.classes is not None))
    if len(named) > 1:
        differing["names of the classes"] = " and ".join(listing(names, limit=5) for names in named)
    tasks, biases = (_given(adapters, name) for name in ("task_type", "bias"))
    for name, values in (("task_type", tasks), ("bias", biases)):
        if len(values) > 1:
            differing[name] = " and ".join(map(repr, values))
    if differing:
        raise AdapterError(
            "updates add up, what is trained whole does not, and in that the adapters differ:\n"
            f"{lines(f'{name}: {how}' for name, how in differing.items())}\n"
            "Say whose head, biases and task to keep; keep=0 keeps the first adapter's (lorica combine: "
            "--keep and its folder)"
        )
    saved = list(dict.fromkeys(name for a in adapters for name in a.lora.modules_to_save or ()))
    both = [path for path in paths if any(f".{name}." in f".{path}." for name in saved)]
    if both:
        raise AdapterError(
            f"{listing(both)}: trained whole in one adapter and updated in another, which has no sum"
        )
    bias = next(iter(biases), "none")
    if bias == "lora_only" and any(path not in adapter.factors for adapter in adapters for path in paths):
        bias = "none"  # some layers have no trained bias; the others' load from the file all the same
    settings = {"task_type": next(iter(tasks), None), "bias": bias, "modules_to_save": saved or None}
    return extras, settings, next(iter(named), None)


def _given(adapters: Sequence[Adapter], name: str) -> list[Any]:
    values = dict.fromkeys(getattr(adapter.lora, name) for adapter in adapters)
    return [value for value in values if value not in (None, "none")]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _same(configs: Sequence[LoraConfig], *names: str) -> bool:
    return all(getattr(config, name) == getattr(configs[0], name) for config in configs for name in names)


def _targets(configs: Sequence[LoraConfig], paths: Sequence[str]) -> dict[str, Any]:
    """Settings that find exactly these layers."""
    names, *rest = _TARGETS
    if _same(configs, *_TARGETS):
        return {}
    lists = [config.target_modules for config in configs if isinstance(config.target_modules, list)]
    if len(lists) == len(configs) and _same(configs, *rest):
        return {names: list(dict.fromkeys(name for each in lists for name in each))}
    # The name of an attention means its output projection too; PEFT would adapt one named beside it twice.
    outputs = {f"{path}.out_proj" for path in paths}
    return {names: [path for path in paths if path not in outputs], **dict.fromkeys(rest)}


def _base(configs: Sequence[LoraConfig]) -> dict[str, Any]:
    bases = list(dict.fromkeys(c.base_model_name_or_path for c in configs if c.base_model_name_or_path))
    if len(bases) > 1:
        warnings.warn(
            f"the adapters name different bases: {listing(map(repr, bases))}. Their layers are alike, but "
            f"unless the weights are too, the result means little. It is recorded as one for {bases[0]!r}",
            LoricaWarning,
            stacklevel=6,
        )
    return {
        "base_model_name_or_path": next(iter(bases), None),
        "revision": configs[0].revision if _same(configs, "revision") else None,
    }
