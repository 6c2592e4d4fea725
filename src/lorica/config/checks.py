"""Checks of a configuration's fields."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from numbers import Integral
from types import UnionType
from typing import Any

from lorica.config.patterns import why_unreadable, with_prefix
from lorica.errors import ConfigError, ConfigTypeError, listing

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
BIASES = ("none", "all", "lora_only")


_LARGEST_INT = 2**31 - 1
_LARGEST = 1e30
"""Scales multiply float32 numbers; larger ones would only give infinity."""


def is_number(value: Any) -> bool:
    """Whether a value is a finite number within the range of scales."""
    # An int of any size compares; NaN compares as False.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_index(value: Any) -> bool:
    """Whether a value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_INT


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return is_index(value) and value >= 1


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse a configuration whose fields hold values of other types than their annotations say.

    A list may be a tuple. Numbers are finite, and a truth value is none.

    Args:
        config: a dataclass.
        prefix: stands before the fields' names in messages.

    Raises:
        ConfigError: naming a field.
    """
    for name, kind in _hints(type(config)):
        value = getattr(config, name)
        if not _is_a(value, kind):
            raise ConfigError(f"{prefix}{name} must be {_in_words(kind)}, not {value!r:.80}")


@functools.cache
def _hints(kind: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]


def _is_a(value: Any, kind: Any) -> bool:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return any(_is_a(value, each) for each in inside)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_is_a(each, inside[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _is_a(key, inside[0]) and _is_a(held, inside[1]) for key, held in value.items()
        )
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return kind is Any or (is_number(value) if kind is float else isinstance(value, kind))


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
    Any: "anything",
}


def _in_words(kind: Any) -> str:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return " or ".join(map(_in_words, inside))
    if origin is list:
        return f"a list, each item {_in_words(inside[0])}"
    if origin is dict:
        return f"a mapping, each value {_in_words(inside[1])}"
    return _WORDS.get(kind) or f"a {kind.__name__}"


def check_count(name: str, value: Any) -> None:
    """Refuse an argument that is no whole number of at least 1.

    Raises:
        ConfigError: naming it.
    """
    if not is_count(value):
        kind = "at least 1" if isinstance(value, int) else "a whole number of at least 1"
        raise ConfigError(f"{name} must be {kind}, not {value!r:.80}")


def check_seed(value: Any) -> None:
    """Refuse a seed that is no whole number: others may have no text that is the same at the next run.

    Raises:
        ConfigError: it is none, and not None.
    """
    if not isinstance(value, Integral | None):
        raise ConfigError(f"seed must be a whole number, or None, not {value!r:.80}")


def check_share(name: str, value: Any, of: str = "a share") -> None:
    """Refuse an argument that is no number above 0 and up to 1.

    Raises:
        ConfigError: naming it.
    """
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be {of} in (0, 1], not {value!r:.80}")


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_index, value)) and value[0] < value[1]


def check(config: Any) -> None:
    """Refuse a configuration with an unusable value.

    Args:
        config: the new `LoraConfig`.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """

    def expect(name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {expected}, not {getattr(config, name)!r}")

    expect("r", is_count(config.r), "a whole number of at least 1")
    expect("lora_alpha", is_number(config.lora_alpha) and config.lora_alpha > 0, "a positive number")
    expect(
        "lora_dropout",
        is_number(config.lora_dropout) and 0 <= config.lora_dropout < 1,
        "a probability in [0, 1)",
    )
    expect("bias", config.bias in BIASES, f"one of {BIASES}")
    if config.task_type is not None and config.task_type not in TASK_TYPES:
        raise ConfigError(
            f"Invalid task type: {config.task_type!r}. Must be one of the following task types: "
            f"{', '.join(TASK_TYPES)}. Or leave task_type out"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        expect(
            name,
            isinstance(patterns, dict) and all(isinstance(key, str) for key in patterns),
            "a map from names",
        )
    expect(
        "rank_pattern",
        all(map(is_count, config.rank_pattern.values())),
        "a map to whole numbers of at least 1",
    )
    expect(
        "alpha_pattern",
        all(is_number(alpha) and alpha > 0 for alpha in config.alpha_pattern.values()),
        "a map to positive numbers",
    )
    flags = ("lora_bias", "use_dora", "use_rslora", "fan_in_fan_out", "ensure_weight_tying", "inference_mode")
    for name in flags:
        expect(name, isinstance(getattr(config, name), bool), "True or False")
    if isinstance(config.target_parameters, str):
        raise ConfigTypeError(
            "target_parameters must be a list of names (`target_parameters` must be a list of strings or "
            f"None.), not {config.target_parameters!r}"
        )
    lists = ("target_parameters", "modules_to_save")
    for name in ("target_modules", "exclude_modules", "layers_pattern", *lists):
        value = getattr(config, name)
        text = isinstance(value, str) and name not in lists
        names = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        expect(
            name,
            value is None or text or names,
            "a list of names" if name in lists else "a string or a list of names",
        )
    ranges = config.layer_replication
    expect(
        "layer_replication",
        ranges is None or (isinstance(ranges, list) and bool(ranges) and all(map(_is_range, ranges))),
        "None or a list of ranges [start, end) of blocks",
    )
    for name in ("base_model_name_or_path", "revision", "variant"):
        expect(name, isinstance(getattr(config, name), str | None), "None or a text")
    _check_tokens(config.trainable_token_indices)
    # PEFT's may be empty until it is used.
    nothing = config.target_modules in ([], "") and not config.target_parameters and not config.keeps_idle
    expect("target_modules", not nothing, "None or name at least one module")
    for name in ("lora_dropout", "use_dora", "lora_bias"):
        if config.target_parameters and getattr(config, name):
            raise ConfigError(
                f"{name} does not go with target_parameters: a parameter's update is folded into what "
                f"its module reads, so it has no input or output of its own; leave {name} out"
            )
    if config.variant is not None and (config.use_dora or config.lora_bias or config.target_parameters):
        raise ConfigError(
            f"variant={config.variant!r} takes the place of use_dora and lora_bias, and is for layers that "
            "are called; leave them and target_parameters out"
        )
    if config.lora_bias and config.use_dora:
        raise ConfigError(
            "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False: it has no "
            "place for a bias on B"
        )
    if config.lora_bias and config.init_lora_weights not in (True, False):
        raise ConfigError(
            "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
            f"init_lora_weights={config.init_lora_weights} instead: that says nothing of a bias"
        )
    layers = config.layers_to_transform
    indices = [layers] if isinstance(layers, int) else layers
    expect(
        "layers_to_transform",
        indices is None or (isinstance(indices, list) and indices != [] and all(map(is_index, indices))),
        "None, a block index, or a list of at least one",
    )
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None and isinstance(config.target_modules, str):
            raise ConfigError(
                f"`{name}` cannot be used when `target_modules` is a str. Put the block indices into the "
                "regular expression, or give a list of names"
            )
    if layers is None and config.layers_pattern:
        raise ConfigError(
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified. The pattern "
            "only says where those indices count"
        )
    for name in ("target_modules", "exclude_modules"):
        _check_regex(name, getattr(config, name))
    holders = config.layers_pattern
    for holder in [holders] if isinstance(holders, str) else holders or ():
        _check_regex("layers_pattern", holder)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            _check_regex(name, key, with_prefix(key))


def _check_tokens(given: Any) -> None:
    tables: dict[Any, Any] = (
        given if isinstance(given, dict) else {} if given is None else {"embedding": given}
    )
    for name, indices in tables.items():
        whole = isinstance(indices, list) and indices and all(map(is_index, indices))
        if not isinstance(name, str) or not name or not whole:
            raise ConfigError(
                "trainable_token_indices must be a list of at least one token's index, or a map from names "
                f"of embeddings to such lists, not {given!r}"
            )
        if twice := sorted({i for i in indices if indices.count(i) > 1}):
            raise ConfigError(f"trainable_token_indices names {listing(map(str, twice))} twice")
    if given == {}:
        raise ConfigError("trainable_token_indices is an empty map; leave it out, or name an embedding")


def _check_regex(name: str, pattern: object, used: str | None = None) -> None:
    if isinstance(pattern, str) and pattern != "all-linear" and (reason := why_unreadable(used or pattern)):
        raise ConfigError(f"{name} holds {pattern!r}, which is not a regular expression: {reason}")
