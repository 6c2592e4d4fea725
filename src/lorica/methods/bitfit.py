"""BitFit: the biases train, and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lorica.config import MethodConfig
from lorica.config.method import Family
from lorica.errors import TargetError
from lorica.find import all_biases
from lorica.layers import Plan
from lorica.pieces import register
from lorica.pieces.plugins.added import MethodKind


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(MethodConfig):
    """Train the base's biases, those of its norms included, and freeze the rest.

    The parameters that `LoraConfig(bias="all")` trains beside its updates.

    Source: Zaken et al., 2021; Hu et al., 2021, §5.1, "Bias-only or BitFit".
    """

    method: ClassVar[str] = "bitfit"
    family: ClassVar[Family] = "selective"


class BitFit(MethodKind):
    """All biases outside the modules trained whole."""

    def plan(self, config: BitFitConfig, root: nn.Module, whole: Collection[str], seed: int) -> Plan:  # noqa: D102
        names = list(all_biases(root, whole))
        if not names:
            raise TargetError(
                f"{type(root).__name__} has no biases, which are all that BitFit trains; choose another "
                "method, such as LoRA"
            )
        return Plan(names)


register(BitFit(), "bitfit")
