"""Adapter layers: small bottlenecks put into a transformer's blocks.

    x ──▶ down (r, d) ──▶ activation ──▶ up (d, r) ──▶ + ──▶       up starts at zero: the identity
    └──────────────────────────────────────────────────┘

AdapterH    after each attention and after the MLP, before the residual is added
AdapterL    after the block, on its LayerNorm'd output; that norm is the adapter's own and trains
AdapterP    after the block's MLP and its LayerNorm; before that norm's second use where there is one
AdapterD    AdapterP, left out of the lowest blocks
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from lorica.config import MethodConfig
from lorica.config.method import Family
from lorica.errors import StateError, TargetError
from lorica.inits import generator
from lorica.layers.plugins.added import AddedModule, Part, Plan, like
from lorica.methods.blocks import inner, stacks, sublayers
from lorica.pieces import register
from lorica.pieces.plugins.added import MethodKind
from lorica.tree import Place

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Projection(nn.Module):
    """A linear map kept in float32, applied in the precision of its input."""

    def __init__(self, weight: Parameter, bias: Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """``x·Wᵀ + b``."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Norm(nn.Module):
    """A LayerNorm kept in float32, applied in the precision of its input."""

    def __init__(self, weight: Parameter, bias: Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input, scaled and shifted."""
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype))


class Bottleneck(nn.Module):
    """``up(activation(down(x)))``, to be added to x; of ``norm(x)`` where there is one."""

    def __init__(
        self,
        host: nn.Module,
        d: int,
        r: int,
        activation: str,
        std: float,
        *,
        norm: bool,
        random: torch.Generator,
    ) -> None:
        super().__init__()
        down = torch.empty(r, d, device="cpu").normal_(0.0, std, generator=random)
        self.norm = Norm(like(host, down.new_ones(d)), like(host, down.new_zeros(d))) if norm else None
        self.down = Projection(like(host, down), like(host, down.new_zeros(r)))
        self.up = Projection(like(host, down.new_zeros(d, r)), like(host, down.new_zeros(d)))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The tensor that is added to x."""
        inside = x if self.norm is None else self.norm(x)
        return self.up(ACTIVATIONS[self.activation](self.down(inside)))


class Bottlenecked(AddedModule):
    """A module whose output passes through the active adapter's bottleneck."""

    own_modules = ("bottleneck",)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs, with the bottleneck's share added to the first tensor."""
        output = super().forward(*args, **kwargs)
        part = self.acting_part(Bottleneck)
        if part is None:
            return output
        if isinstance(output, Tensor):
            return output + part(output)
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            return (output[0] + part(output[0]), *output[1:])
        raise StateError(
            f"{self.base_class.__name__} returns a {type(output).__name__}, and a bottleneck stands behind "
            "modules that return a tensor, or a tuple that starts with one"
        )


class NormBottlenecked(AddedModule):
    """The LayerNorm behind an MLP, between whose two uses the bottleneck stands (AdapterFusion's placement).

    ``LN(z + bottleneck(LN(z)))`` for the sum z of the MLP's output and its input.
    """

    own_modules = ("bottleneck",)

    def forward(self, z: Tensor) -> Tensor:
        """The norm of z, or of z with the bottleneck's share."""
        output = super().forward(z)
        part = self.acting_part(Bottleneck)
        return output if part is None else super().forward(z + part(output))


@dataclass(frozen=True, kw_only=True)
class _BottleneckConfig(MethodConfig):
    """The part that the adapter layers share.

    Args:
        bottleneck: r, the width of each.
        activation: between the two projections: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        init_std: standard deviation of the down-projection's start; the up-projection starts at zero.
    """

    family: ClassVar[Family] = "additive"

    bottleneck: int = 64
    activation: str = "relu"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self._expect_count("bottleneck", 1)
        self._expect("activation", self.activation in (*ACTIVATIONS,), f"one of {tuple(ACTIVATIONS)}")
        ok = isinstance(self.init_std, int | float) and not isinstance(self.init_std, bool)
        self._expect("init_std", ok and 0 < self.init_std < float("inf"), "a positive number")

    def places(self, block: Place, index: int, blocks: int) -> list[tuple[Place, type[AddedModule]]]:
        """The modules of a block behind which a bottleneck stands, and their replacements.

        Args:
            block: the block.
            index: of the block in its stack, from the lowest.
            blocks: of the stack.
        """
        raise NotImplementedError

    def fresh(self, block: nn.Module, d: int, random: torch.Generator, *, norm: bool = False) -> Bottleneck:
        """A new bottleneck beside a module of width d."""
        return Bottleneck(block, d, self.bottleneck, self.activation, self.init_std, norm=norm, random=random)


@dataclass(frozen=True, kw_only=True)
class AdapterHConfig(_BottleneckConfig):
    """Houlsby's adapters: after each attention (cross-attention too) and after the MLP, before the residual.

    ``(2·d·r + r + d)`` parameters for each, two a block.

    Args:
        bottleneck: r, the width of each.
        activation: between the two projections: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        init_std: standard deviation of the down-projection's start; the up-projection starts at zero.

    Raises:
        ConfigError: a value is out of range or of the wrong type.

    Source: Houlsby et al., 2019; Hu et al., 2021, §5.1, "AdapterH".
    """

    method: ClassVar[str] = "adapter-h"

    activation: str = "gelu"

    def places(self, block: Place, index: int, blocks: int) -> list[tuple[Place, type[AddedModule]]]:
        """Each attention's end, and the MLP's."""
        found = sublayers(block)
        return [(inner(block, path), Bottlenecked) for path in (*found.attention, found.mlp)]


@dataclass(frozen=True, kw_only=True)
class AdapterLConfig(_BottleneckConfig):
    """Lin's adapters: after the block, on its output under a LayerNorm of their own, which trains too.

    ``(2·d·r + r + d) + 2·d`` parameters a block.

    Args:
        bottleneck: r, the width of each.
        activation: between the two projections: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        init_std: standard deviation of the down-projection's start; the up-projection starts at zero.

    Raises:
        ConfigError: a value is out of range or of the wrong type.

    Source: Lin et al., 2020, §2.1; Hu et al., 2021, §5.1, "AdapterL".
    """

    method: ClassVar[str] = "adapter-l"

    def places(self, block: Place, index: int, blocks: int) -> list[tuple[Place, type[AddedModule]]]:
        """The block itself."""
        return [(block, Bottlenecked)]

    def fresh(self, block: nn.Module, d: int, random: torch.Generator, *, norm: bool = True) -> Bottleneck:
        """With a norm of its own."""
        return super().fresh(block, d, random, norm=norm)


@dataclass(frozen=True, kw_only=True)
class AdapterPConfig(_BottleneckConfig):
    """Pfeiffer's adapters: one a block, after its MLP.

    Where a LayerNorm follows the MLP's residual sum z (BERT), the block ends in
    ``LN(z + bottleneck(LN(z)))``; where it stands before the MLP (GPT-2), in ``z + bottleneck(z)``.
    ``(2·d·r + r + d)`` parameters a block.

    Args:
        bottleneck: r, the width of each.
        activation: between the two projections: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        init_std: standard deviation of the down-projection's start; the up-projection starts at zero.

    Raises:
        ConfigError: a value is out of range or of the wrong type.

    Source: Pfeiffer et al., 2021, §3; Hu et al., 2021, §5.1, "AdapterP".
    """

    method: ClassVar[str] = "adapter-p"

    def places(self, block: Place, index: int, blocks: int) -> list[tuple[Place, type[AddedModule]]]:
        """The norm behind the MLP, or the block."""
        norm = sublayers(block).norm
        return [(block, Bottlenecked)] if norm is None else [(inner(block, norm), NormBottlenecked)]


@dataclass(frozen=True, kw_only=True)
class AdapterDConfig(AdapterPConfig):
    """AdapterDrop: `AdapterPConfig`, left out of the lowest blocks, in training and at inference alike.

    The layers below the lowest adapter then need no backward pass.

    Args:
        dropped: lowest blocks (of each stack) that get none.
        bottleneck: r, the width of each.
        activation: between the two projections: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        init_std: standard deviation of the down-projection's start; the up-projection starts at zero.

    Raises:
        ConfigError: a value is out of range or of the wrong type.

    Source: Rücklé et al., 2021; Hu et al., 2021, §5.1, "AdapterD".
    """

    method: ClassVar[str] = "adapter-d"

    dropped: int = 5

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self._expect_count("dropped", 0)

    def places(self, block: Place, index: int, blocks: int) -> list[tuple[Place, type[AddedModule]]]:
        """As `AdapterPConfig`, above the dropped blocks."""
        if self.dropped >= blocks:
            raise TargetError(
                f"dropped={self.dropped} leaves no adapter in a stack of {blocks} blocks; drop fewer"
            )
        return [] if index < self.dropped else super().places(block, index, blocks)


class Bottlenecks(MethodKind):
    """A bottleneck at each of the method's places."""

    def plan(self, config: _BottleneckConfig, root: nn.Module, whole: Collection[str], seed: int) -> Plan:  # noqa: D102
        d = hidden_size(root)
        parts = []
        for stack in stacks(root):
            for i, block in enumerate(stack):
                for place, host in config.places(block, i, len(stack)):
                    part = config.fresh(block.module, d, generator(seed, place.path))
                    parts.append(Part(place.path, place.module, host, part))
        return Plan(parts=parts)


def hidden_size(root: nn.Module) -> int:
    """Width of a transformer's blocks.

    Raises:
        TargetError: its configuration does not say, or its stages have each their own (Swin).
    """
    config = getattr(root, "config", None)
    if isinstance(depths := getattr(config, "depths", None), (list, tuple)) and len(depths) > 1:
        raise TargetError(
            f"{type(root).__name__} has {len(depths)} stages of blocks, each with a width of its own; this "
            "method needs one width for all"
        )
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        d = getattr(config, name, None)
        if isinstance(d, int):
            return d
    raise TargetError(f"{type(root).__name__} has no config that says its hidden_size")


register(Bottlenecks(), "adapter-h", "adapter-l", "adapter-p", "adapter-d")
