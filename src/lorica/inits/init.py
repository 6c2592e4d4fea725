"""The protocol of an init, the registry of inits, and residuals of W0.

A start that is subtracted from W0 (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) leaves a residual, which replaces W0
while the adapter acts:

    W0 ──▶ (W0 − scale·B₀·A₀) + scale·B·A,   A = A₀ and B = B₀ at the start

W0 itself is set aside and never written to, so it comes back bit for bit, and other adapters act on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.config import LoraConfig
from lorica.config.inits import FROM_DATA, changes_base, make_known
from lorica.errors import ConfigError, TargetError
from lorica.find import Target
from lorica.folding import fold, one_thread
from lorica.layers import LoraLayer


@dataclass(eq=False)
class Residual:
    """The residual of W0 after a start was subtracted.

    Args:
        weight: replaces W0 while the adapter acts: W0 minus the start, or W0 quantized.
        A: the start's own A (r, d_in), to tell what training changed; None where W0 was quantized.
        B: the start's own B (d_out, r).
    """

    weight: Parameter
    A: Tensor | None = None
    B: Tensor | None = None


class Initial(NamedTuple):
    """A and B (float32 or better) at the start, and the residual if W0 is replaced."""

    A: Tensor
    B: Tensor
    start: Residual | None = None


class Init(ABC):
    """A way in which A and B start.

    Attributes:
        residual: whether ``scale·B·A`` is subtracted from W0 at the start.
        reads_weight: whether it starts from W0 or from the layer's inputs; for linear layers only.
        looks: whether it looks at the layer's inputs, so that the layer must be called.
        directions: number of W0's directions that it needs per unit of rank.
    """

    residual: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True
    looks: ClassVar[bool] = False
    directions: ClassVar[int] = 1

    @abstractmethod
    def factors(
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A and B at the start; the module is not touched.

        Args:
            target: the module, of kind `Target.layer`.
            config: gives the rank (`LoraConfig.rank`) and the scale (`LoraConfig.scale`).
            seen: the result of `look` for this module; None without data.
            random: the module's own source of draws.

        Returns:
            A and B in the shapes of `Target.factor_shapes`, in float32 or better.
        """

    def takes(self, value: bool | str) -> bool:
        """Whether it serves a value of `init_lora_weights` too that it is not registered under."""
        return False

    def initialize(self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator) -> Initial:
        """The factors and, if W0 is replaced, the residual.

        Raises:
            TargetError: the init is not possible on this kind of module.
            StateError: the init needs data, and none was given.
        """
        self.check(target, config)
        A, B = self.factors(target, config, seen, random)
        precision = torch.promote_types(A.dtype, B.dtype)
        A, B = A.to(precision), B.to(precision)
        if not self.residual:
            return Initial(A, B)
        return Initial(own(A), own(B), residual_of(target, A, B, config.scale(target.path)))

    def look(self, model: nn.Module, config: LoraConfig, data: Any, seed: int) -> Mapping[str, Any]:
        """Run data through the model, for inits that look at some; the model stays as it is.

        Args:
            model: the model, not adapted by this configuration yet.
            config: what will be adapted.
            data: the `data` of `lorica.adapt`.
            seed: fixes the draws.

        Returns:
            Path of each targeted module → what it saw: the argument `seen` of `factors`.
        """
        raise NotImplementedError

    def check(self, target: Target, config: LoraConfig) -> None:
        """Refuse a module on which this init is not possible.

        Raises:
            TargetError: naming the module and the remedy.
        """
        if self.reads_weight:
            _check_weight(self, target, config)


PREPARED = "lorica_prepared"
"""Attribute of a model that has seen data: path → what the module's init needs."""
INITS: dict[bool | str, Init] = {}
"""Value of `LoraConfig.init_lora_weights` → init."""


def register(value: str, init: Init) -> Init:
    """Make an init known as a value of `LoraConfig.init_lora_weights`."""
    make_known(value, residual=init.residual)
    INITS[value] = init
    return init


def of(config: LoraConfig) -> Init:
    """The init that a configuration asks for."""
    value = config.init_lora_weights
    return INITS.get(value) or next(init for init in INITS.values() if init.takes(value))


def check_alone(lora: LoraConfig) -> None:
    """Refuse an init, in a combination of methods, that assumes LoRA alone.

    Raises:
        ConfigError: the configuration has such an init.
    """
    value = lora.init_lora_weights
    if changes_base(value) or value in FROM_DATA:
        raise ConfigError(
            f"init_lora_weights={value!r} is for LoRA alone, not in a combination; make two adapters of "
            "them, or take True"
        )


def residual_of(target: Target, A: Tensor, B: Tensor, scale: float) -> Residual:
    """The residual after subtracting ``scale · B·A`` from W0. A and B are copied."""
    A, B = own(A), own(B)
    return Residual(stored(target, subtract(target.layer, base_weight(target), A, B, scale)), A, B)


def subtract(layer: type[LoraLayer], weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``W0 − scale·B·A`` (d_out, d_in) in A's precision, with the same bits on any number of threads."""
    with one_thread():
        return fold(layer.as_matrix(weight.detach()).to(A), B, A, -scale)


def _check_weight(init: Init, target: Target, config: LoraConfig) -> None:
    """Refuse a module whose W0 cannot be read, or has too few directions."""
    value, path, layer = config.init_lora_weights, target.path, target.layer
    what = f"{path}: init_lora_weights={value!r}"
    kind = type(target.module).__name__
    if target.parameter is not None:
        raise TargetError(
            f"{target.pattern_path}: init_lora_weights={value!r} is for linear layers, and this is a "
            "parameter that its module reads itself; leave it out, or take True"
        )
    if layer.kind != "linear":
        raise TargetError(f"{what} is for linear layers, and this is a {kind}; leave it out, or take True")
    if init.residual and layer.opaque:
        raise TargetError(
            f"{what} starts from W0 itself, and this {kind} packs it or has a forward of its own; adapt the "
            "base before it is quantized, or take True; replace_lora_weights_loftq then starts it by LoftQ "
            "from the unquantized base's files"
        )
    if init.looks and not layer.takes_dropout:  # neither has an input
        raise TargetError(
            f"{what} looks at what the layer is given, and this {kind} is read without being called; leave "
            "it out"
        )
    (r, d_in), (d_out, _) = layer.factor_shapes(target.module, config.rank(path))
    needed = init.directions * r
    if needed > min(d_in, d_out):
        raise TargetError(
            f"{what} at r={r} needs {needed} directions, and a weight of {d_out} × {d_in} has "
            f"{min(d_in, d_out)}; choose a smaller rank"
        )


def own(factor: Tensor) -> Tensor:
    """A copy: a slice of a decomposition would keep all of it in memory."""
    return factor.detach().clone(memory_format=torch.contiguous_format)


def base_weight(target: Target) -> Parameter:
    """The module's present weight."""
    weight = target.module._parameters[target.layer.weight_name]
    assert weight is not None
    return weight


def precise(target: Target) -> Tensor:
    """W0 as (d_out, d_in), in float32 or its own higher precision."""
    weight = base_weight(target).detach()
    return target.layer.as_matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))


def stored(target: Target, matrix: Tensor) -> Parameter:
    """A matrix (d_out, d_in) in the layout of the module's weight."""
    weight = base_weight(target)
    matrix = matrix.t() if target.layer.transposed else matrix
    return Parameter(matrix.to(weight.dtype).contiguous(), requires_grad=False)
