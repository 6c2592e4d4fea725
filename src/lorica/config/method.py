"""`MethodConfig`: what the other methods' configurations share, and how they are read."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias, cast

from lorica.config.checks import TASK_TYPES
from lorica.config.lora import LoraConfig
from lorica.errors import ConfigError, listing, nearest

Family = Literal["selective", "reparametrisation", "additive"]
_METHODS: dict[str, type[MethodConfig]] = {}
_MORE = "lorica.methods"
"""The package whose methods are known by their names before anything imports it."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """What to train, by another method than LoRA.

    A subclass that has a `method` of its own can be read from files by that name.

    Args:
        modules_to_save: modules trained and saved whole, such as a new classification head.
        task_type: as `LoraConfig.task_type`; ``"SEQ_CLS"``, ``"TOKEN_CLS"`` and ``"QUESTION_ANS"`` train the
            model's new head too.
        inference_mode: attach frozen.
        base_model_name_or_path: the base it belongs to. Filled in by `adapt`.
        revision: revision of that base.

    Attributes:
        method: its name in `adapter_config.json`.
        family: ``"selective"`` (trains some of the base's own parameters), ``"reparametrisation"`` (trains an
            update of them in another form) or ``"additive"`` (adds to what the model computes).
    """

    method: ClassVar[str]
    family: ClassVar[Family]

    modules_to_save: list[str] | None = None
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __init_subclass__(cls) -> None:
        """Let files name the method."""
        super().__init_subclass__()
        if "method" in cls.__dict__:
            _METHODS[cls.method] = cls

    def __post_init__(self) -> None:
        """Normalise lists and check every value."""
        names = self.modules_to_save
        if isinstance(names, Iterable) and not isinstance(names, str):
            names = sorted(names) if isinstance(names, (set, frozenset)) else list(names)
            object.__setattr__(self, "modules_to_save", names)
        named = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        self._expect("modules_to_save", names is None or named, "None or a list of names")
        if self.task_type is not None:
            object.__setattr__(self, "task_type", str(getattr(self.task_type, "value", self.task_type)))
        self._expect(
            "task_type",
            self.task_type is None or self.task_type in TASK_TYPES,
            f"None or one of {TASK_TYPES}",
        )
        self._expect("inference_mode", isinstance(self.inference_mode, bool), "True or False")
        for name in ("base_model_name_or_path", "revision"):
            self._expect(name, isinstance(getattr(self, name), str | None), "None or a text")

    def parts(self) -> tuple[AdapterConfig, ...]:
        """The configurations of the single methods that make up the adapter: this one."""
        return (self,)

    def members(self) -> tuple[LoraConfig | None, list[MethodConfig]]:
        """The LoRA among the adapter's methods, if there is one, and the other methods."""
        return None, [self]

    def asks(self) -> set[str]:
        """Names under which kinds of pieces register: the method, its family, and each field that is set."""
        return {self.method, self.family, *(name for name, value in vars(self).items() if value)}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them, with the name of the method."""
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: a field that the method does not have, or a value that it cannot use.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for name in data:
            if name not in known and name != "method":
                raise ConfigError(f"{cls.method} has no field {name!r}{nearest(name, known)}")
        return cls(**{name: value for name, value in data.items() if name != "method"})

    def _expect(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {expected}, not {getattr(self, name)!r}")

    def _expect_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self._expect(name, ok, f"a whole number of at least {least}")


AdapterConfig: TypeAlias = LoraConfig | MethodConfig


def as_config(config: AdapterConfig | Iterable[AdapterConfig] | None) -> AdapterConfig:
    """One configuration from what `adapt` takes: one, several to combine, or None for LoRA's defaults.

    Raises:
        ConfigError: the several cannot be combined, or something is no configuration.
    """
    if config is None:
        return LoraConfig()
    one = isinstance(config, Mapping | str) or not isinstance(config, Iterable)
    configs: tuple[Any, ...] = (config,) if one else tuple(cast("Iterable[Any]", config))
    for each in configs:
        if not isinstance(each, LoraConfig | MethodConfig):
            kind = f"{type(each).__module__}.{type(each).__qualname__}".removeprefix("builtins.")
            raise ConfigError(
                f"a configuration is a lorica.LoraConfig(...) or another method's, not a {kind}"
            )
    return configs[0] if len(configs) == 1 else importlib.import_module(_MORE).Combination(configs=configs)


def method_of(config: AdapterConfig) -> str:
    """Name of a configuration's method."""
    return "lora" if isinstance(config, LoraConfig) else config.method


def family_of(config: AdapterConfig) -> str:
    """Class of a configuration's method: selective, reparametrisation or additive."""
    return "reparametrisation" if isinstance(config, LoraConfig) else config.family


def read_config(data: Mapping[str, Any]) -> AdapterConfig:
    """The configuration in an `adapter_config.json`: the method that it names, or PEFT's LoRA.

    Raises:
        ConfigError: a method or a field that lorica does not know, or a value that cannot be used.
    """
    method = data.get("method", "lora")
    if isinstance(method, str) and method != "lora" and method not in _METHODS:
        importlib.import_module(_MORE)  # this floor does not know them, and few files name one
    if method == "lora":
        return LoraConfig.from_dict({name: value for name, value in data.items() if name != "method"})
    if not isinstance(method, str) or method not in _METHODS:
        known = ["lora", *_METHODS]
        hint = nearest(method, known) if isinstance(method, str) else ""
        raise ConfigError(f"there is no method {method!r}{hint}; there are {listing(known)}")
    return _METHODS[method].from_dict(data)
