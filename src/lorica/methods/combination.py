"""`Combination`: several methods that make up one adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lorica.config import AdapterConfig, LoraConfig, MethodConfig, family_of, method_of, read_config
from lorica.errors import ConfigError, listing


@dataclass(frozen=True, kw_only=True)
class Combination(MethodConfig):
    """Several methods that make up one adapter, trained and saved together.

    `adapt` makes one from a list of configurations. What they say of heads, of the base and of inference is
    the combination's.

    Args:
        configs: one configuration a method; of LoRA one at most.
    """

    method: ClassVar[str] = "combination"
    configs: tuple[AdapterConfig, ...] = ()

    def __post_init__(self) -> None:
        """Check the methods, and take over what is common to them."""
        object.__setattr__(self, "configs", tuple(self.configs))
        if not self.configs:
            raise ConfigError("configs must hold at least one configuration")
        for config in self.configs:
            if not isinstance(config, LoraConfig | MethodConfig) or isinstance(config, Combination):
                raise ConfigError(
                    f"configs must hold configurations of single methods, not a {type(config).__name__}"
                )
        twice = [name for name in self.methods if self.methods.count(name) > 1]
        if twice:
            raise ConfigError(
                f"{twice[0]} is given twice, and two of one method own the same parameters; give it once, or "
                "make two adapters, each with a name of its own"
            )
        heads = [name for part in (self, *self.configs) for name in part.modules_to_save or ()]
        object.__setattr__(self, "modules_to_save", list(dict.fromkeys(heads)) or None)
        for field in ("task_type", "base_model_name_or_path", "revision"):
            values = {value for part in (self, *self.configs) if (value := getattr(part, field)) is not None}
            if len(values) > 1:
                raise ConfigError(
                    f"the methods of one adapter must agree on {field}, not {listing(map(repr, values))}"
                )
            object.__setattr__(self, field, values.pop() if values else None)
        frozen = any(part.inference_mode for part in (self, *self.configs))
        object.__setattr__(self, "inference_mode", frozen)
        super().__post_init__()

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return [method_of(config) for config in self.configs]

    @property
    def family(self) -> str:  # type: ignore[override]
        """The families of its methods, joined by " + "."""
        return " + ".join(dict.fromkeys(family_of(config) for config in self.configs))

    def parts(self) -> tuple[AdapterConfig, ...]:
        """The configurations of its methods."""
        return self.configs

    def members(self) -> tuple[LoraConfig | None, list[MethodConfig]]:
        """As `MethodConfig.members`; what the combination says of heads holds for its LoRA."""
        lora = next((part for part in self.configs if isinstance(part, LoraConfig)), None)
        if lora is not None:
            lora = lora.replace(modules_to_save=self.modules_to_save, task_type=self.task_type)
        return lora, [part for part in self.configs if isinstance(part, MethodConfig)]

    def to_dict(self) -> dict[str, Any]:
        """As `MethodConfig.to_dict`; each method as a file of its own would have it."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {"method": self.method, **fields, "configs": [config.to_dict() for config in self.configs]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """As `MethodConfig.from_dict`."""
        configs = data.get("configs")
        if not isinstance(configs, list) or not all(isinstance(item, Mapping) for item in configs):
            raise ConfigError(f"configs must be a list of configurations, not {configs!r}")
        return super().from_dict({**data, "configs": tuple(map(read_config, configs))})
