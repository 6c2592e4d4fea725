"""The adapter as a value, which needs no model: factors by module path, and how they were made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lorica.config import AdapterConfig, LoraConfig, changes_base, method_of
from lorica.errors import AdapterError, listing

Kind = Literal["linear", "embedding", "conv", "parameter"]

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""The place of an embedding's trained rows under its path: in an adapter, in PEFT's files, and live."""


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's update, ``scale · B·A``.

    Args:
        A: (r, d_in); for an embedding (r, vocabulary); for a convolution (r, channels_in, *kernel); for a
            parameter that stacks experts (experts·r, d_in), expert after expert.
        B: (d_out, r); for an embedding (dim, r); for a convolution (channels_out, r / groups, 1, ...); for a
            parameter that stacks experts (d_out, r·experts), an expert's columns `experts` apart.
        scale: α/r or α/√r.
        kind: what sort of layer they belong to.
        magnitude: (d_out,) with DoRA: the norm that each row of ``W0 + scale·B·A`` is brought to. Else None.
        bias: (d_out,) with `lora_bias`: what is added to ``B·A·x`` before the scale. Else None.
    """

    A: Tensor
    B: Tensor
    scale: float
    kind: Kind = "linear"
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def r(self) -> int:
        """Rank of the update: rows of A."""
        return self.A.shape[0]

    @property
    def groups(self) -> int:
        """Groups of the convolution they belong to; 1 for every other layer."""
        return self.r // self.B.shape[1]

    def blocks(self) -> tuple[Tensor, Tensor]:
        """B and A as matrices, whose products are the update before its scale.

        Each group of a convolution has its own rows of A: B is (groups, d_out / groups, r / groups) and A
        (groups, r / groups, d_in), with a kernel's places among d_in. Elsewhere there is one group.
        """
        B, A = self.B.detach().flatten(1), self.A.detach().flatten(1)
        return B.unflatten(0, (self.groups, -1)), A.unflatten(0, (self.groups, -1))

    def transposed(self) -> Factors:
        """The same update of the same table: a head's where this is an embedding's, or the reverse."""
        kind: Kind = "linear" if self.kind == "embedding" else "embedding"
        return Factors(self.B.t(), self.A.t(), self.scale, kind)

    def shares(self, other: Factors) -> bool:
        """Whether this is another's update, number for number; of a head and an embedding, transposed."""
        if self.magnitude is not None or other.magnitude is not None or self.bias is not None:
            return False
        other = other if self.kind == other.kind else other.transposed()
        alike = self.scale == other.scale and self.A.shape == other.A.shape and self.B.shape == other.B.shape
        return alike and torch.equal(self.A, other.A) and torch.equal(self.B, other.B)

    def norm(self) -> float:
        """Frobenius norm of ``scale · B·A``, from r × r products, without forming B·A.

        For a stack of experts, whose update is no single product, that of the factors as they stand.
        """
        B, A = (block.double() for block in self.blocks())
        return abs(self.scale) * float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter: everything that training made, and nothing of the base.

    Args:
        config: how it was made.
        factors: module path in the base model → its update. Of several parameters of one module
            (`target_parameters`) the one that it registered last has the module's path, and each before it
            one more ``.base_layer`` at its end, as in PEFT's files.
        extras: parameter name in the base model → tensor trained whole (a new head, biases).
            An embedding's trained rows (tokens, dim) are ``<path>.token_adapter.trainable_tokens_delta``.
        added: name → tensor of what a method added to the model (bottlenecks, a prefix).
        trained_as: where the adapter's start was taken out of W0: how it trains on. The factors are then of
            twice the rank, first what trains, then less its start, so that they are an update of W0 as any
            other. None where they train as they are.
        classes: names of the classes, by their place among the outputs of a head in `extras`; None where
            there is none, or they have no names.
        stacks: how an older version of PEFT computed with factors of stacked experts: ``"plain"`` took each
            stack as (experts, d_in, d_out), ``"turned"`` every one the wrong way round. None: as `Factors`
            says.
    """

    config: AdapterConfig
    factors: Mapping[str, Factors]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    trained_as: LoraConfig | None = None
    classes: tuple[str, ...] | None = None
    stacks: Literal["plain", "turned"] | None = None

    @staticmethod
    def check(given: Any) -> Adapter:
        """An argument itself, if it is an adapter.

        Raises:
            AdapterError: it is something else.
        """
        if not isinstance(given, Adapter):
            raise AdapterError(
                f"an adapter as a value is due, not a {type(given).__name__}: lorica.read takes one from a "
                "folder, lorica.extract from a model"
            )
        return given

    @property
    def lora(self) -> LoraConfig:
        """The configuration of an adapter that is LoRA's alone.

        Raises:
            AdapterError: it is another method's, which has no updates of rank r to work on.
        """
        if not isinstance(self.config, LoraConfig):
            raise AdapterError(
                f"this is for LoRA adapters, whose updates are products B·A; the adapter's method is "
                f"{method_of(self.config)}"
            )
        return self.config

    def with_starts(self, starts: Mapping[str, tuple[Tensor, Tensor]]) -> Adapter:
        """The same adapter as an update of W0 itself: ``[B, −B₀]·[A; A₀]``.

        Args:
            starts: module path → A₀ and B₀, which were taken out of W0.
        """
        factors = {
            path: dataclasses.replace(
                f,
                A=torch.cat([f.A, starts[path][0].to(f.A)]),
                B=torch.cat([f.B, -starts[path][1].to(f.B)], 1),
            )
            for path, f in self.factors.items()
        }
        # Not what the configuration says of its start: a script may have said otherwise since.
        return dataclasses.replace(self, config=self.lora.doubled(), factors=factors, trained_as=self.lora)

    def without_starts(self) -> tuple[Adapter, dict[str, tuple[Tensor, Tensor]]]:
        """Undo `with_starts`: the adapter as it trains, and its starts.

        Raises:
            AdapterError: its ranks are not those of such an adapter.
        """
        config = self.trained_as
        assert config is not None
        factors, starts = {}, {}
        for path, f in self.factors.items():
            r = config.rank(path)
            if f.r != 2 * r:
                raise AdapterError(
                    f"{path} has rank {f.r}; with its start beside what trains at r={r} it should be {2 * r}"
                )
            factors[path] = dataclasses.replace(f, A=f.A[:r], B=f.B[:, :r], scale=config.scale(path))
            starts[path] = f.A[r:], -f.B[:, r:]
        return dataclasses.replace(self, config=config, factors=factors, trained_as=None), starts

    def check_on_base(self, doing: str) -> None:
        """Refuse factors that mean nothing without the weight their start was taken out of.

        Raises:
            AdapterError: saying how to get others.
        """
        value = self.config.init_lora_weights if isinstance(self.config, LoraConfig) else True
        if changes_base(value):
            raise AdapterError(
                f"cannot {doing}: init_lora_weights={value!r} means that these factors stand beside another "
                "weight than W0. lorica.load it on its base and lorica.save it, and it is an update of W0"
            )

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by a name for messages: what each module has, then the extras."""
        parts = {
            f"{path} ({part})": tensor
            for path, f in self.factors.items()
            for part, tensor in (("A", f.A), ("B", f.B), ("magnitude", f.magnitude), ("bias", f.bias))
            if tensor is not None
        }
        return {**parts, **self.extras, **self.added}

    @property
    def numel(self) -> int:
        """Number of parameters, extras included."""
        return sum(t.numel() for t in self.named_tensors().values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, extras included."""
        return sum(t.numel() * t.element_size() for t in self.named_tensors().values())

    def check_finite(self) -> None:
        """Refuse NaN and infinity, and tensors without values.

        Raises:
            AdapterError: naming each tensor that holds one, or is on the meta device.
        """
        named = {name: _summable(tensor) for name, tensor in self.named_tensors().items()}
        if bare := [name for name, tensor in named.items() if tensor.is_meta]:
            raise AdapterError(f"the adapter is on the meta device, without values: {listing(bare)}")
        # A sum is finite only if all its terms are, and much cheaper than a look at each; it may overflow,
        # though.
        suspects = {n: t for n, t in named.items() if not math.isfinite(t.sum().item())}
        bad = [name for name, t in suspects.items() if not torch.isfinite(t).all()]
        if bad:
            raise AdapterError(
                f"the adapter holds NaN or infinity in {listing(bad)}; the training that made it diverged"
            )


def host_of(path: str) -> tuple[str, str]:
    """A module's path without the ``.base_layer`` suffixes that tell its parameters apart, and these."""
    host = re.sub(r"(\.base_layer)+$", "", path)
    return host, path[len(host) :]


def _summable(tensor: Tensor) -> Tensor:
    """The same numbers in a dtype that is added up: not in 8 bits, and real."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
