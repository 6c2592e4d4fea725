"""The values of `init_lora_weights` and their settings, in PEFT's names and JSON."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

from lorica.config.checks import is_count, is_number
from lorica.errors import ConfigError, listing, nearest

Direction = Literal["ArBr", "A2rBr", "ArB2r", "random"]
Scaling = Literal["stable", "weight_svd", "gd_scale", "unit"]

BASE_KEPT: list[bool | str] = [True, False, "gaussian", "orthogonal", "eva"]
"""Inits that leave W0 as it is."""
FROM_DATA = ("eva", "corda", "lora_ga")
"""Inits that look at data."""
INITS: list[bool | str] = [*BASE_KEPT, "pissa", "pissa_niter_[number]", "olora", "corda", "lora_ga", "loftq"]
_NITER = re.compile(r"pissa_niter_(\d{1,9})")


def make_known(value: str, *, residual: bool) -> None:
    """Let configurations name an init.

    Args:
        value: its value of `init_lora_weights`.
        residual: whether its start is subtracted from W0.
    """
    if value not in INITS:
        INITS.append(value)
        if not residual:
            BASE_KEPT.append(value)


def niter(init: bool | str) -> int | None:
    """N of ``"pissa_niter_N"``, the subspace iterations of a randomized decomposition; None for others."""
    hit = _NITER.fullmatch(init) if isinstance(init, str) else None
    return int(hit[1]) if hit else None


def changes_base(init: bool | str) -> bool:
    """Whether the start is subtracted from W0, so that a residual replaces it."""
    return init not in BASE_KEPT


@dataclass(frozen=True)
class InitConfig:
    """Base class of the inits' settings."""

    belongs_to: ClassVar[str]
    """The value of `init_lora_weights` that reads these settings."""

    @classmethod
    def from_value(cls, value: Any) -> Self | None:
        """The settings, from an instance, a dictionary as JSON holds it, or nothing (None or empty).

        Raises:
            ConfigError: an unknown field, or a value of another type.
        """
        if isinstance(value, cls):
            return value
        if value is None or value == {}:
            return None
        # PEFT's own objects have the same fields.
        if dataclasses.is_dataclass(value) and type(value).__name__ == cls.__name__:
            value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{cls.__name__} or a dictionary of its fields was expected, not {value!r}")
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = [f"{key}{nearest(str(key), known)}" for key in value if key not in known]
        if unknown:
            raise ConfigError(f"{cls.__name__} has no field {listing(unknown)}")
        return cls(**value)

    def _expect(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{name} must be {expected}, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class LoftQConfig(InitConfig):
    """``"loftq"``: a quantized base, with factors that make up for its rounding (Li et al., 2023).

    Args:
        loftq_bits: 4 quantizes to NF4 in blocks of 64, 8 to whole numbers by rows.
        loftq_iter: rounds of quantizing and decomposing. At least 1.

    Raises:
        ConfigError: a value is out of range.
    """

    belongs_to: ClassVar[str] = "loftq"
    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        self._expect("loftq_bits", self.loftq_bits in (4, 8), "4 (NF4) or 8")
        self._expect("loftq_iter", is_count(self.loftq_iter), "a whole number of at least 1")


@dataclass(frozen=True)
class EvaConfig(InitConfig):
    """``"eva"``: A from the principal directions of each layer's inputs (Paischer et al., 2024).

    Args:
        rho: bound on a layer's rank, as a multiple of `r`, when ranks go where inputs vary most; 1 keeps all
            ranks.
        tau: a direction has settled when its cosine with the previous batch's is at least this; in [0, 1].
        use_label_mask: leave out the tokens that have no target.
        label_mask_value: the label of those tokens.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: change alpha with the rank, so that the scale of each update stays the same.

    Raises:
        ConfigError: a value is out of range.
    """

    belongs_to: ClassVar[str] = "eva"
    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        self._expect("rho", is_number(self.rho) and self.rho >= 1, "a number (`rho` must be >= 1.0)")
        within = is_number(self.tau) and 0 <= self.tau <= 1
        self._expect("tau", within, "a number (`tau` must be between 0.0 and 1.0.)")
        self._expect("label_mask_value", isinstance(self.label_mask_value, int), "a whole number")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            self._expect(name, isinstance(getattr(self, name), bool), "True or False")


@dataclass(frozen=True)
class CordaConfig(InitConfig):
    """``"corda"``: W0 decomposed in the directions that its inputs take (Yang et al., 2024).

    Args:
        cache_file: file for the decompositions; read instead of computing them if it is there.
        covariance_file: file for the covariances of the inputs, which serve any rank; read if it is there.
            As large as the model.
        corda_method: ``"ipm"`` trains what the inputs use most, to learn quickly; ``"kpm"`` what they use
            least, to keep what is known.
        verbose: say what is being done.
        use_float16_for_covariance: add up the covariances in half precision.
        prune_temporary_fields: no effect, for nothing stays on the modules; PEFT's files have it.

    Raises:
        ConfigError: a value is out of range.
    """

    belongs_to: ClassVar[str] = "corda"
    cache_file: str | os.PathLike[str] | None = None
    covariance_file: str | os.PathLike[str] | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("cache_file", "covariance_file"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        self._expect("corda_method", self.corda_method in ("ipm", "kpm"), "'ipm' or 'kpm'")
        for name in ("cache_file", "covariance_file"):
            value = getattr(self, name)
            self._expect(name, value is None or isinstance(value, str), "None or a path")
        for name in ("verbose", "use_float16_for_covariance", "prune_temporary_fields"):
            self._expect(name, isinstance(getattr(self, name), bool), "True or False")


@dataclass(frozen=True)
class LoraGAConfig(InitConfig):
    """``"lora_ga"``: A and B from the gradient that full fine-tuning would follow first (Wang et al., 2024).

    Args:
        direction: which of the gradient's 2r leading singular vectors become A and B. ``"ArB2r"``: A the
            first r, B the next; ``"A2rBr"``: the reverse; ``"ArBr"``: in turn, B first; ``"random"``: both
            the same r, drawn.
        scale: ``"stable"`` multiplies B by d_out^¼/√γ; ``"weight_svd"`` brings its first column to W0's
            largest singular value; ``"gd_scale"`` divides both by the scale α/r; ``"unit"`` leaves them.
        stable_gamma: γ.

    Raises:
        ConfigError: a value is out of range.
    """

    belongs_to: ClassVar[str] = "lora_ga"
    direction: Direction = "ArB2r"
    scale: Scaling = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        """Check the values."""
        self._expect("direction", self.direction in get_args(Direction), f"one of {get_args(Direction)}")
        self._expect("scale", self.scale in get_args(Scaling), f"one of {get_args(Scaling)}")
        self._expect(
            "stable_gamma", is_number(self.stable_gamma) and self.stable_gamma > 0, "a positive number"
        )


SETTINGS: dict[str, type[InitConfig]] = {
    f"{cls.belongs_to}_config": cls for cls in (LoftQConfig, EvaConfig, CordaConfig, LoraGAConfig)
}
"""Field of `LoraConfig` → class of its value."""


def without_idle(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of the start that let go of another start's settings."""
    start = changes["init_lora_weights"]
    idle = {name: None for name, settings in SETTINGS.items() if settings.belongs_to != start}
    return {**idle, **changes}


def check_init(config: Any) -> None:
    """Refuse an unknown init, and settings that no init would read.

    Args:
        config: the new `LoraConfig`.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """
    value = config.init_lora_weights
    if not _is_known(value):
        if value == "mica":
            raise ConfigError(
                "init_lora_weights='mica': MiCA, which trains A alone, is not carried; take 'pissa' or 'eva'"
            )
        hint = (
            nearest(value, [name for name in INITS if isinstance(name, str)])
            if isinstance(value, str)
            else ""
        )
        raise ConfigError(f"init_lora_weights must be one of {tuple(INITS)}, not {value!r}{hint}")
    for name, settings in SETTINGS.items():
        if not config.keeps_idle and getattr(config, name) is not None and value != settings.belongs_to:
            raise ConfigError(
                f"{name} is set, but only init_lora_weights={settings.belongs_to!r} reads it, and that is "
                f"{value!r}"
            )
    odd = [r for r in (config.r, *config.rank_pattern.values()) if isinstance(r, int) and r % 2]
    if value == "orthogonal" and odd:
        raise ConfigError(f"init_lora_weights='orthogonal' splits the rank in halves; it cannot be {odd[0]}")


def _is_known(init: object) -> bool:
    named = isinstance(init, str) and ((init in INITS and "[" not in init) or niter(init) is not None)
    return isinstance(init, bool) or named
