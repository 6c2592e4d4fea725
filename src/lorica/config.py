"""`LoraConfig`: what to train, in PEFT's own field names and JSON."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lorica.errors import ConfigError, listing, nearest

TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian")

# Fields that PEFT writes and lorica does not act on, with the values that ask for nothing. Any other value is
# refused by name.
_INERT: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False,),
    "use_qalora": (False,),
    "qalora_group_size": (16,),
    "ensure_weight_tying": (False,),
    "megatron_core": ("megatron.core",),
}
# Fields that say who wrote the file, not what to do.
_PROVENANCE = ("peft_type", "peft_version", "auto_mapping", "runtime_config")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to train: ``h = W0·x + scale·B·A·x`` beside each targeted weight (Hu et al., 2021, eq. 3).

    Field names, defaults and JSON are PEFT's, so one `adapter_config.json` serves both.

    Args:
        r: rank of each update; the inner dimension of B·A. At least 1.
        lora_alpha: numerator of the scale α/r (α/√r with `use_rslora`).
        lora_dropout: probability in [0, 1) of dropping an input of A, in training only.
        target_modules: modules to adapt. A list matches whole names or dotted suffixes (``"query"`` finds
            every ``….query``); a string is a regular expression over the full name; ``"all-linear"`` takes
            every linear layer but the output head; None takes the architecture's attention query and value
            projections.
        exclude_modules: modules to leave out, matched like `target_modules`.
        bias: which of the base's biases train as well: ``"none"``, ``"all"``, or ``"lora_only"`` (those of
            the adapted layers).
        use_dora: train the magnitude of each output's weights too, and let B·A turn their direction (Liu et
            al., 2024).
        use_rslora: scale by α/√r, so that large ranks keep learning (Kalajdzievski, 2023).
        modules_to_save: modules trained and saved whole, such as a new classification head.
        init_lora_weights: how A and B start. True: A Kaiming-uniform, B zero; ``"gaussian"``: A normal with
            standard deviation 1/r, B zero; False: both random, so the model changes at once (for tests).
        rank_pattern: name or regular expression → rank, where it differs from `r`. The first match wins.
        alpha_pattern: name or regular expression → alpha, where it differs from `lora_alpha`.
        layers_to_transform: indices of the transformer blocks to adapt; None adapts all.
        layers_pattern: name of the list that holds the blocks (``"layers"``, ``"h"``); None accepts any.
        fan_in_fan_out: the weight is stored (in, out), as in transformers' Conv1D. Detected, so there is no
            need to set it.
        task_type: one of ``"SEQ_CLS"``, ``"TOKEN_CLS"``, ``"QUESTION_ANS"``, ``"CAUSAL_LM"``,
            ``"SEQ_2_SEQ_LM"``, ``"FEATURE_EXTRACTION"``, or None. The first three train the model's new head
            too.
        inference_mode: attach the adapter frozen.
        base_model_name_or_path: the base the adapter belongs to. Filled in by `adapt`.
        revision: revision of that base.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    use_dora: bool = False
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Normalise lists and check every value."""
        for name in (
            "target_modules",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
        ):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                # A set has no order of its own; sorted, the file it is saved to is the same every time.
                object.__setattr__(
                    self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value)
                )
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            object.__setattr__(self, name, dict(value) if isinstance(value, Mapping) else value or {})
        if self.task_type is not None:
            object.__setattr__(self, "task_type", str(getattr(self.task_type, "value", self.task_type)))
        _check(self)

    def rank(self, path: str) -> int:
        """Rank of the module at `path`: `rank_pattern` where it matches, else `r`."""
        return _first_match(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """Scale of the module's update: α/r, or α/√r with `use_rslora`, after the patterns."""
        r, alpha = self.rank(path), _first_match(self.alpha_pattern, path, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them, ``peft_type`` included."""
        return {"peft_type": "LORA", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the fields of an `adapter_config.json`, PEFT's or lorica's.

        Raises:
            ConfigError: another method's file, or a setting that lorica does not know and so cannot honour.
        """
        method = data.get("peft_type", "LORA")
        if str(getattr(method, "value", method)).upper() != "LORA":
            raise ConfigError(f"peft_type is {method!r}; this is not a LoRA adapter")
        known = {item.name for item in dataclasses.fields(cls)}
        refused = [
            f"{key}={value!r}{nearest(key, known)}"
            for key, value in data.items()
            if key not in known and key not in _PROVENANCE and value and value not in _INERT.get(key, ())
        ]
        if refused:
            raise ConfigError(
                f"the configuration asks for what lorica does not support: {listing(refused)}. "
                "Loading it without would give another model than the one trained."
            )
        # PEFT writes null for a pattern or list that was never set.
        return cls(**{key: value for key, value in data.items() if key in known and value is not None})


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if matches_pattern(key, path)), default)


def matches_pattern(key: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` speaks of the module at `path`."""
    return re.fullmatch(_with_prefix(key), path) is not None


def _with_prefix(key: str) -> str:
    return rf"(.*\.)?({key})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rank(value: Any) -> bool:
    return _is_index(value) and value >= 1


def _check(config: LoraConfig) -> None:
    def expect(name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {expected}, not {getattr(config, name)!r}")

    expect("r", _is_rank(config.r), "a whole number of at least 1")
    expect("lora_alpha", _is_number(config.lora_alpha) and config.lora_alpha > 0, "a positive number")
    expect(
        "lora_dropout",
        _is_number(config.lora_dropout) and 0 <= config.lora_dropout < 1,
        "a probability in [0, 1)",
    )
    expect("bias", config.bias in BIASES, f"one of {BIASES}")
    expect(
        "task_type",
        config.task_type is None or config.task_type in TASK_TYPES,
        f"None or one of {TASK_TYPES}",
    )
    expect(
        "init_lora_weights",
        isinstance(config.init_lora_weights, (bool, str)) and config.init_lora_weights in INITS,
        f"one of {INITS}",
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
        all(map(_is_rank, config.rank_pattern.values())),
        "a map to whole numbers of at least 1",
    )
    expect(
        "alpha_pattern",
        all(_is_number(alpha) and alpha > 0 for alpha in config.alpha_pattern.values()),
        "a map to positive numbers",
    )
    for name in ("use_dora", "use_rslora", "fan_in_fan_out", "inference_mode"):
        expect(name, isinstance(getattr(config, name), bool), "True or False")
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = getattr(config, name)
        text = isinstance(value, str) and name != "modules_to_save"
        names = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        expect(
            name,
            value is None or text or names,
            "a list of names" if name == "modules_to_save" else "a string or a list of names",
        )
    expect("target_modules", config.target_modules not in ([], ""), "None or name at least one module")
    layers = config.layers_to_transform
    indices = [layers] if isinstance(layers, int) else layers
    expect(
        "layers_to_transform",
        indices is None or (isinstance(indices, list) and indices != [] and all(map(_is_index, indices))),
        "None, a block index, or a list of at least one",
    )
    if layers is None and config.layers_pattern:
        raise ConfigError(
            "layers_pattern only says where layers_to_transform counts; set layers_to_transform too"
        )
    if layers is not None and isinstance(config.target_modules, str):
        raise ConfigError(
            "layers_to_transform works with a list of target_modules (or None); put the block "
            "indices into the regular expression instead"
        )
    for name in ("target_modules", "exclude_modules"):
        _check_regex(name, getattr(config, name))
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            _check_regex(name, key, _with_prefix(key))


def _check_regex(name: str, pattern: object, used: str | None = None) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(used or pattern)
        except re.error as error:
            raise ConfigError(
                f"{name} holds {pattern!r}, which is not a regular expression: {error}"
            ) from error
