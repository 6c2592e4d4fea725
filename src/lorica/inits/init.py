"""The protocol of an init, the registry of them, and what a start leaves of W0.

A start that is taken out of W0 (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) leaves another weight, which stands in
W0's place while the adapter acts:

    W0 ──▶ (W0 − scale·B₀·A₀) + scale·B·A,   A = A₀ and B = B₀ at the start

W0 itself is set aside and never written to, so that it comes back bit for bit, and another adapter acts on
it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.config import LoraConfig
from lorica.config.inits import FROM_DATA, changes_base, make_known, niter
from lorica.errors import ConfigError, StateError, TargetError
from lorica.find import Target
from lorica.folding import fold, one_thread
from lorica.layers import (
    LoraAttention,
    LoraAttentionOutput,
    LoraConv,
    LoraEmbedding,
    LoraLayer,
    LoraOpaque,
    Uncalled,
)

S = TypeVar("S")


@dataclass(eq=False)
class Residual:
    """A start that was taken out of W0.

    Args:
        weight: what stands in W0's place while the adapter acts: W0 less the start, or W0 quantized.
        A: the start's own A (r, d_in), to tell what training changed; None where W0 was quantized.
        B: its B (d_out, r).
    """

    weight: Parameter
    A: Tensor | None = None
    B: Tensor | None = None


class Initial(NamedTuple):
    """A and B (float32 or better), and what takes W0's place, if anything does."""

    A: Tensor
    B: Tensor
    start: Residual | None = None


class Init(ABC):
    """A way in which A and B start.

    Attributes:
        residual: whether ``scale·B·A`` is taken out of W0 at the start.
        reads_weight: whether it starts from W0, or from what the layer is given: for linear layers alone.
        looks: whether it looks at what the layer is given, which must then be called.
        directions: how many directions of W0 it needs for each one of the rank.
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
            config: says the rank (`LoraConfig.rank`) and the scale (`LoraConfig.scale`).
            seen: what data showed of the module, where `looks` had it look at some; else None.
            random: source of all draws, the module's own.

        Returns:
            A and B in the shapes of `Target.factor_shapes`, in float32 or better.
        """

    def initialize(self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator) -> Initial:
        """The factors, and the weight to go with them.

        Raises:
            TargetError: such a start is not possible on this kind of module.
            StateError: it needs data that the model was not shown.
        """
        self.check(target, config)
        A, B = self.factors(target, config, seen, random)
        precision = torch.promote_types(A.dtype, B.dtype)
        A, B = A.to(precision), B.to(precision)
        if not self.residual:
            return Initial(A, B)
        return Initial(own(A), own(B), residual_of(target, A, B, config.scale(target.path)))

    def look(self, model: nn.Module, config: LoraConfig, data: Any, seed: int) -> Mapping[str, Any]:
        """Show the model data, where `looks`; it is left as it was.

        Args:
            model: the model, not adapted by this configuration yet.
            config: what will be adapted.
            data: as it was given to `lorica.adapt`.
            seed: source of draws.

        Returns:
            What was seen of each targeted module, by path: `seen` of `factors`.
        """
        raise NotImplementedError

    def check(self, target: Target, config: LoraConfig) -> None:
        """Refuse a module on which such a start is not possible.

        Raises:
            TargetError: naming the module, and what to do.
        """
        if self.reads_weight:
            _check_weight(self, target, config)


PREPARED = "lorica_prepared"
"""Attribute of a model that was shown data: what its modules' starts are made from, by path."""
INITS: dict[bool | str, Init] = {}
"""Value of `LoraConfig.init_lora_weights` → how A and B start."""


def register(value: str, init: Init) -> Init:
    """Make an init known as a value of `LoraConfig.init_lora_weights`."""
    make_known(value, residual=init.residual)
    INITS[value] = init
    return init


def of(config: LoraConfig) -> Init:
    """The init that a configuration asks for."""
    value = config.init_lora_weights
    return INITS["pissa" if niter(value) is not None else value]


def check_alone(lora: LoraConfig) -> None:
    """Refuse a start that is worked out for LoRA alone in a combination of methods.

    Raises:
        ConfigError: it is.
    """
    value = lora.init_lora_weights
    if changes_base(value) or value in FROM_DATA:
        raise ConfigError(
            f"init_lora_weights={value!r} is for LoRA alone, not in a combination; make two adapters of "
            "them, or take True"
        )


def residual_of(target: Target, A: Tensor, B: Tensor, scale: float) -> Residual:
    """The start that takes ``scale · B·A`` out of W0. A and B are copied."""
    A, B = own(A), own(B)
    return Residual(stored(target, subtract(target.layer, base_weight(target), A, B, scale)), A, B)


def subtract(layer: type[LoraLayer], weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``W0 − scale·B·A`` (d_out, d_in) in A's precision, with the same bits on any number of threads."""
    with one_thread():
        return fold(layer.as_matrix(weight.detach()).to(A), B, A, -scale)


def check_seen(
    seen: object, kind: type[S], directions: int, target: Target, config: LoraConfig, call: str
) -> S:
    """What data showed of a module, as a start needs it.

    Args:
        seen: what was noted, if anything was.
        kind: of what is expected.
        directions: for each one of the rank.
        target: the module.
        config: says the rank.
        call: what looks at data for such a start.

    Raises:
        StateError: nothing was noted, or for another rank.
    """
    value, r = config.init_lora_weights, config.rank(target.path)
    if not isinstance(seen, kind):
        raise StateError(
            f"{target.path}: init_lora_weights={value!r} starts from what data shows of this layer; give "
            f"lorica.adapt some (data=...), or call {call}(model, config, ...) with this configuration "
            "before adapting"
        )
    singular: Any = seen
    have = len(singular.S) // directions
    if have != r:
        raise StateError(f"{target.path}: {call} was called for r={have}, and now r={r}; call it again")
    return seen


def _check_weight(init: Init, target: Target, config: LoraConfig) -> None:
    """Refuse a module whose W0 cannot be started from, or has too few directions."""
    value, path, layer = config.init_lora_weights, target.path, target.layer
    what = f"{path}: init_lora_weights={value!r}"
    kind = type(target.module).__name__
    if target.parameter is not None:
        raise TargetError(
            f"{target.pattern_path}: init_lora_weights={value!r} is for linear layers, and this is a "
            "parameter that its module reads itself; leave it out, or take True"
        )
    if issubclass(layer, (LoraEmbedding, LoraConv)):
        raise TargetError(f"{what} is for linear layers, and this is a {kind}; leave it out, or take True")
    if init.residual and issubclass(layer, LoraOpaque):
        raise TargetError(
            f"{what} starts from W0 itself, and this {kind} packs it or has a forward of its own; adapt the "
            "base before it is quantized, or take True; replace_lora_weights_loftq then starts it by LoftQ "
            "from the unquantized base's files"
        )
    if init.looks and issubclass(layer, (LoraAttention, LoraAttentionOutput, Uncalled)):
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
    """A copy: what was cut out of a decomposition would keep the whole of it in memory."""
    return factor.detach().clone(memory_format=torch.contiguous_format)


def base_weight(target: Target) -> Parameter:
    """What stands in the module as its weight."""
    weight = target.module._parameters[target.layer.weight_name]
    assert weight is not None
    return weight


def precise(target: Target) -> Tensor:
    """W0 as (d_out, d_in), in float32 or its own higher precision."""
    weight = base_weight(target).detach()
    return target.layer.as_matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))


def stored(target: Target, matrix: Tensor) -> Parameter:
    """A matrix (d_out, d_in) as the module stores its weight."""
    weight = base_weight(target)
    matrix = matrix.t() if target.layer.transposed else matrix
    return Parameter(matrix.to(weight.dtype).contiguous(), requires_grad=False)
