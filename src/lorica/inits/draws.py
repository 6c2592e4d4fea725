"""Random inits: Kaiming, normal, orthogonal."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica.config import LoraConfig
from lorica.find import Target
from lorica.inits.init import INITS, Init, Initial, register


def draw_seed() -> int:
    """Take one seed from torch's global generator, so that `torch.manual_seed` fixes the adapter too."""
    return int(torch.randint(2**62, (), device="cpu").item())


def generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the module's path alone."""
    digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Drawn(Init):
    """One of A and B is drawn and the other zero, so B·A is zero; with False both are drawn."""

    reads_weight: ClassVar[bool] = False

    def initialize(self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator) -> Initial:
        """The factors; W0 stays as it is."""
        if self.reads_weight:
            self.check(target, config)
        return Initial(*self.factors(target, config, seen, random))

    def factors(
        self, target: Target, config: LoraConfig, seen: Any, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See `start`."""
        value, r = config.init_lora_weights, config.rank(target.pattern_path)
        embedding = target.layer.kind == "embedding"
        A, B = start(target.factor_shapes(r), value, random, embedding=embedding)
        if value == "gaussian":
            A *= A.shape[0] / r  # the deviation follows one expert's rank
        return A, B


class Orthogonal(Drawn):
    """Neither A nor B is zero, but B·A is."""

    reads_weight: ClassVar[bool] = True
    directions: ClassVar[int] = 0


def start(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    init: bool | str,
    random: torch.Generator,
    *,
    embedding: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Draw A and B on the CPU.

    Args:
        shapes: shapes of A (r, ...) and B (..., r).
        init: `LoraConfig.init_lora_weights`. True: A Kaiming-uniform with a = √5, B zero (microsoft/LoRA),
            but for embeddings A zero and B standard normal; ``"gaussian"``: A normal with standard deviation
            1/r, B zero; ``"orthogonal"``: neither zero, but B·A is; ``"eva"``: as True, until it has seen
            inputs; False: both drawn, so that the update is not zero at the start.
        random: source of the draws.
        embedding: whether the layer is an embedding.
        dtype: dtype of both factors.

    Returns:
        A and B.
    """
    A, B = (torch.zeros(shape, dtype=dtype, device="cpu") for shape in shapes)
    if embedding:
        B.normal_(generator=random)
        if init is False:
            A.normal_(generator=random)
        return A, B
    if init == "gaussian":
        A.normal_(0.0, 1 / A.shape[0], generator=random)
        return A, B
    if init == "orthogonal":
        return _orthogonal(A, B, random)
    _uniform(A, random)
    if init is False:
        _uniform(B, random)
    return A, B


def start_bias(d_out: int, r: int, init: bool | str, random: torch.Generator) -> Tensor:
    """The bias on B (d_out,) at the start: zero, or uniform where `init` is False, as A and B then are."""
    bias = torch.zeros(d_out, device="cpu")
    return bias.uniform_(-1 / math.sqrt(r), 1 / math.sqrt(r), generator=random) if init is False else bias


def _orthogonal(A: Tensor, B: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    # A is mixed from one half of an orthonormal basis of the rank, B from the other: B·A = 0.
    r, draw = len(A), partial(torch.randn, generator=random, dtype=A.dtype, device="cpu")
    basis = torch.linalg.qr(draw(r, r)).Q
    A = basis[0::2].t() @ draw(r // 2, A.shape[1]) / 10
    B = draw(len(B), r // 2) @ basis[1::2] / 10
    return A, B


def _uniform(factor: Tensor, random: torch.Generator) -> None:
    # Kaiming's bound with a = √5 is 1/√fan_in: what torch's own linear and convolution layers start from.
    bound = 1 / math.sqrt(math.prod(factor.shape[1:]))
    factor.uniform_(-bound, bound, generator=random)


INITS[True] = INITS[False] = register("gaussian", Drawn())
register("orthogonal", Orthogonal())
