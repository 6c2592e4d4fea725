"""Names of modules, checks of adapters beside each other, and small helpers that scripts import."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import lorica
from lorica.config import LoraConfig, matches_pattern
from lorica.errors import AdapterError, ConfigError, LoricaWarning, listing, require
from lorica.find import HEADS, matching, means_all_linear
from lorica.layers import SavedModule as ModulesToSaveWrapper
from lorica.layers import TrainedTokens as TrainableTokensWrapper
from lorica.model.pretrained.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from lorica.peft.utils.constants import CONFIG_NAME as CONFIG_NAME
from lorica.peft.utils.constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from lorica.peft.utils.constants import WEIGHTS_NAME as WEIGHTS_NAME
from lorica.pieces import resolve
from lorica.state import AdapterState, find_adapted
from lorica.tree import walk

AuxiliaryTrainingWrapper = (ModulesToSaveWrapper, TrainableTokensWrapper)
"""Classes for isinstance: a module trained whole, or one some of whose rows are."""

_PREFIX = "lora_"


def infer_device() -> str:
    """The available accelerator, or "cpu"."""
    for name in ("cuda", "mps", "xpu", "npu", "mlu"):
        backend: Any = getattr(torch, name, None)
        if backend is not None and hasattr(backend, "is_available") and backend.is_available():
            return name
    return "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, transposed if it is stored (in, out)."""
    if not fan_in_fan_out:
        return weight
    return Parameter(weight.T) if isinstance(weight, Parameter) else weight.T


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to a lower precision, and those that train to float32.

    Args:
        model: wrapped or not.
        dtype: of the frozen parameters, such as torch.bfloat16.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The model's own quantization settings, if they are of this method; else None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """FSDP1's policy of the modules to shard by themselves: the blocks, and leaves that train.

    Args:
        model: wrapped or not. The base, or ``FSDP_TRANSFORMER_CLS_TO_WRAP``, names the blocks' classes.

    Raises:
        ConfigError: the model has no module of a named class.
        MissingExtra: accelerate is not installed.
    """
    from torch.distributed.fsdp.wrap import (
        _or_policy,
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    dataclasses: Any = require("accelerate.utils.dataclasses", extra="train")
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = sorted(_blocks(model)) if named is None else named.split(",")
    classes = set()
    for name in filter(None, names):
        found = dataclasses.get_module_class_from_name(model, name)
        if found is None:
            raise ConfigError(f"the model has no module of the class {name!r} to be sharded by itself")
        classes.add(found)
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _blocks(model: nn.Module) -> set[str]:
    """Names of the classes that the model says must not be split."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not any(module.children()) and weight is not None and weight.requires_grad


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The holder of a module, the module, and its name there."""
    above, _, name = key.rpartition(".")
    return model.get_submodule(above), model.get_submodule(key), name


def named_whole(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration with whole names of the modules that `modules_to_save` means in PEFT.

    There a name may be any ending of a module's name: "norm" means every ``input_layernorm`` too, and "head"
    an ``lm_head``.

    Args:
        model: the base.
        config: as it was given.
    """
    given, heads = config.modules_to_save or [], HEADS.get(config.task_type or "", ())
    paths = [place.path for place in walk(model) if place.path]
    names: list[str] = []
    for name in dict.fromkeys([*given, *heads]):
        parts = name.count(".") + 1
        endings = [".".join(path.split(".")[-parts:]) for path in paths if path.endswith(name)]
        names += endings or [name]
    names = [name for name in dict.fromkeys(names) if name in given or name not in heads]
    return config if names == given else config.replace(modules_to_save=names)


class IdleWarning(LoricaWarning, RuntimeWarning):
    """A part of a configuration names something that the model does not have, and has no effect."""


def without_idle(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration without exclusions and keys of patterns that match nothing, as PEFT ignores them.

    Likewise where, of `target_modules` and `target_parameters`, one matches nothing and the other something.

    Args:
        model: the base.
        config: as it was given.

    Raises:
        TargetError: `target_modules` names what the model does not have.

    Warns:
        LoricaWarning: naming each.
    """
    excluded = config.exclude_modules
    if excluded:
        places = [place for place in walk(model) if place.path]
        if isinstance(excluded, str):
            kept = excluded if matching(excluded, places) else None
        else:
            kept = [name for name in excluded if matching([name], places)]
        if kept != excluded:
            gone = (
                excluded
                if isinstance(excluded, str)
                else listing(n for n in excluded if n not in (kept or ()))
            )
            warnings.warn(
                f"You have passed exclude_modules={excluded!r} but no modules were excluded by {gone}: the "
                "model has none of that name",
                IdleWarning,
                stacklevel=6,
            )
            config = config.replace(exclude_modules=kept or None)
    config = _without_idle_targets(model, config)
    if not config.rank_pattern and not config.alpha_pattern:
        return config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever adapts says it again
        layers = resolve(model, config.replace(rank_pattern={}, alpha_pattern={})).targets
    changes = {}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field)
        idle = [key for key in pattern if not any(matches_pattern(key, it.pattern_path) for it in layers)]
        if idle:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: "
                f"{sorted(idle)}.",
                IdleWarning,
                stacklevel=6,
            )
            changes[field] = {key: value for key, value in pattern.items() if key not in idle}
    return config.replace(**changes) if changes else config


def _without_idle_targets(model: nn.Module, config: LoraConfig) -> LoraConfig:
    modules, parameters = config.target_modules, config.target_parameters
    if not modules or not parameters or means_all_linear(modules):
        return config
    places = [place for place in walk(model) if place.path]
    hits = bool(matching(modules, places))
    named = [f".{place.path}.{leaf}" for place in places for leaf in place.module._parameters]
    found = any(path.endswith(f".{name}") for path in named for name in parameters)
    if hits == found:
        return config
    idle, what = ("target_modules", "module") if found else ("target_parameters", "parameter")
    given = set(modules) if found and not isinstance(modules, str) else getattr(config, idle)
    warnings.warn(f"{idle}={given} were set but no {what} was matched.", IdleWarning, stacklevel=7)
    return config.replace(**{idle: [] if found else None})


def warn_of_name(name: str) -> None:
    """Warn if PEFT would confuse an adapter's name with the prefix of its keys.

    Warns:
        LoricaWarning: it would.
    """
    if name in _PREFIX:
        warnings.warn(
            f"Adapter name '{name}' should not be contained in the prefix '{_PREFIX}'. It works here; PEFT "
            "may start such an adapter anew when it loads it",
            LoricaWarning,
            stacklevel=3,
        )


def put_again(model: nn.Module, name: str, put: Callable[[str], object]) -> None:
    """Put an adapter on a model; it replaces an existing one of that name, as in PEFT.

    Args:
        model: the base, without a wrapper.
        name: of the adapter.
        put: puts it on under a given name.

    Warns:
        LoricaWarning: the model carries adapters already.
    """
    found = find_adapted(model)
    if found is not None:
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model "
            "with a different config, make sure to call `.unload()` before. "
            + (
                f"The adapter {name!r} that is there gives way"
                if name in found[1].configs
                else "The others stay"
            ),
            LoricaWarning,
            stacklevel=4,
        )
    if found is None or name not in found[1].configs:
        put(name)
        return
    trial = f"{name}-again"  # on an error the existing one stays
    with torch.random.fork_rng(devices=[]):
        put(trial)
    lorica.detach(model, trial)
    lorica.detach(model, name)
    put(name)


def check_one_bias(config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
    """Refuse a second adapter that trains biases of the base.

    Raises:
        ConfigError: two adapters train biases.
    """
    biased = [name for name, other in others.items() if other.bias != "none"]
    if config.bias != "none" and biased:
        raise ConfigError(
            "LoraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' "
            f"for all adapters: {listing(map(repr, biased))} trains biases already (lorica.adapt gives each "
            "adapter biases of its own)"
        )


def check_alone(root: nn.Module, state: AdapterState, names: Sequence[str]) -> None:
    """Refuse two adapters that each bring the same module whole, or rows of the same table.

    Raises:
        AdapterError: naming them.
    """
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            both = sorted({*state.whole(name)} & {*state.whole(other)})
            if both:
                rows = isinstance(root.get_submodule(both[0]), TrainableTokensWrapper)
                kind = "TrainableTokensWrapper" if rows else "ModulesToSaveWrapper"
                raise AdapterError(
                    f"Only one adapter can be set at a time for {kind}, got {len(names)}: {name!r} and "
                    f"{other!r} each bring their own {listing(both)}; updates of rank r add up, what is "
                    "trained whole does not"
                )


def check_rows_apart(state: AdapterState, names: Sequence[str]) -> None:
    """Refuse to merge adapters that train the same rows of a table.

    Raises:
        AdapterError: naming the adapters and the table.
    """
    for i, name in enumerate(names):
        for other in names[:i]:
            mine, its = state.whole(name), state.whole(other)
            for path in mine.keys() & its.keys():
                if (mine[path] or frozenset()) & (its[path] or frozenset()):
                    raise AdapterError(
                        f"Token indices of adapter {name} are already defined and would result in undefined "
                        f"merging behavior: {other!r} brings rows of {path} that {name!r} brings too; merge "
                        "one of them"
                    )


def say_untied(model: nn.Module, *, by_merge: bool) -> None:
    """Warn if a model's tables are not tied, and make its configuration say so.

    Args:
        model: merged model.
        by_merge: whether merging untied them. If not, the configuration may have been wrong before.

    Warns:
        LoricaWarning: they are not tied, and the configuration says or said that they are.
    """
    config: Any = getattr(model, "config", None)
    if not by_merge and getattr(config, "tie_word_embeddings", None) is True:
        tables: list[Any] = []
        for get in ("get_input_embeddings", "get_output_embeddings"):
            with contextlib.suppress(AttributeError, NotImplementedError):
                tables.append(getattr(getattr(model, get)(), "weight", None))
        by_merge = (
            len(tables) == 2 and all(table is not None for table in tables) and tables[0] is not tables[1]
        )
        config.tie_word_embeddings = not by_merge
    if by_merge:
        warnings.warn(
            "Input and output embeddings are no longer tied after merging. Setting "
            "`tie_word_embeddings=False` in the model config.",
            LoricaWarning,
            stacklevel=3,
        )
