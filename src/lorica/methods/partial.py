"""Full fine-tuning, and fine-tuning of the last blocks: the base's own parameters train, as copies.

The base keeps its parameters aside, so that `disabled` shows it and `detach` gives it back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lorica.config import MethodConfig
from lorica.config.method import Family
from lorica.errors import TargetError
from lorica.layers import Plan
from lorica.methods.blocks import stacks
from lorica.pieces import register
from lorica.pieces.plugins.added import MethodKind
from lorica.tree import base_parameters, within_any


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Full fine-tuning (FT): every parameter trains.

    The model then needs twice its memory, for the base stays as it was beside the trained copy.

    Source: Hu et al., 2021, §5.1, "Fine-Tuning".
    """

    method: ClassVar[str] = "full"
    family: ClassVar[Family] = "selective"


class Full(MethodKind):
    """All parameters that are not trained whole already."""

    def plan(self, config: FullConfig, root: nn.Module, whole: Collection[str], seed: int) -> Plan:  # noqa: D102
        return Plan(_trained(root, [""], whole, config.method))


@dataclass(frozen=True, kw_only=True)
class TopConfig(MethodConfig):
    """Fine-tuning of the last blocks (FT-Top2): the others, the embeddings and the last norm stay frozen.

    Of an encoder-decoder, the decoder's last blocks.

    Args:
        blocks: number of blocks.

    Raises:
        ConfigError: a value is out of range or of the wrong type.

    Source: Hu et al., 2021, §5.1; Li & Liang, 2021.
    """

    method: ClassVar[str] = "top"
    family: ClassVar[Family] = "selective"

    blocks: int = 2

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self._expect_count("blocks", 1)


class Top(MethodKind):
    """The parameters of the last blocks."""

    def plan(self, config: TopConfig, root: nn.Module, whole: Collection[str], seed: int) -> Plan:  # noqa: D102
        stack = stacks(root)[-1]
        if config.blocks > len(stack):
            raise TargetError(
                f"blocks={config.blocks}, but {type(root).__name__} has {len(stack)}; give fewer, or train "
                "all of it with FullConfig"
            )
        return Plan(_trained(root, [block.path for block in stack[-config.blocks :]], whole, config.method))


def _trained(root: nn.Module, inside: list[str], saved: Collection[str], method: str) -> list[str]:
    parameters = {
        name: parameter
        for name, parameter in base_parameters(root).items()
        if ("" in inside or within_any(name, inside)) and not within_any(name, saved)
    }
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise TargetError(
                f"{name} is packed ({parameter.dtype}), and {method} trains the weights themselves; load the "
                "model unquantized, or use a method that leaves them frozen, such as LoRA"
            )
    return list(parameters)


register(Full(), "full")
register(Top(), "top")
