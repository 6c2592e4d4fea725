"""An adapter in the engine: factors by the layer that they act on, and the optimizer's state beside them.

flat       ┃ A₁ ┃ B₁ ┃ A₂ ┃ B₂ ┃ …      one block of memory each for the numbers, their gradients and
gradient   ┃dA₁ ┃dB₁ ┃dA₂ ┃dB₂ ┃ …      AdamW's two averages, so that a step is a handful of operations
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import lorica
from lorica.adapter import Adapter, Factors
from lorica.config import LoraConfig
from lorica.errors import AdapterError
from lorica.service.engine.several.memory import zeros
from lorica.service.engine.targets import Targets
from lorica.service.errors import UserError

ALPHA = 32
"""The numerator of the scale, whatever the rank."""
_ALIGNED = 16  # numbers: products of tensors that begin at 64 bytes round the same wherever they lie


@dataclass(eq=False, slots=True)
class LowRank:
    """One layer's update, and where its gradients are added; None where it does not train."""

    A: Tensor
    B: Tensor
    scale: float
    dA: Tensor | None = None
    dB: Tensor | None = None


class Weights:
    """An adapter that acts in the engine.

    Args:
        adapter: as a value.
        model: the base whose layers its paths name.

    Raises:
        UserError: it does more than add products to linear layers, or does not fit the base.
    """

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        """Copy its factors in one block."""
        if adapter.extras or adapter.added or adapter.trained_as is not None:
            raise UserError("only an adapter that is LoRA's alone can be served here, without trained heads")
        self.config = adapter.lora
        self.paths: dict[str, LowRank] = {}
        self._layers: dict[int, LowRank] = {}
        device, numbers = next(model.parameters()).device, numbered(model)
        # By path: a file keeps no order of its own, and what the optimizer remembers is laid out likewise.
        found = dict(sorted(adapter.factors.items()))
        self.layout = [
            (numbers[_layer(model, path, f)], tuple(f.A.shape), tuple(f.B.shape), f.scale)
            for path, f in found.items()
        ]
        total = sum(_room(shape) for _, *shapes, _ in self.layout for shape in shapes)
        self.flat = zeros(total, device)
        for (path, factors), (layer, *_), (A, B) in zip(
            found.items(), self.layout, _views(self.flat, self.layout), strict=True
        ):
            A.copy_(factors.A)
            B.copy_(factors.B)
            self.paths[path] = self._layers[layer] = LowRank(A, B, factors.scale)

    def of(self, layer: int) -> LowRank | None:
        """The update of a layer of the base, by its number there, if it has one."""
        return self._layers.get(layer)

    def adapter(self) -> Adapter:
        """The adapter as a value; shares memory."""
        return Adapter(self.config, {path: Factors(f.A, f.B, f.scale) for path, f in self.paths.items()})

    @property
    def numel(self) -> int:
        """Its parameters."""
        return sum(f.A.numel() + f.B.numel() for f in self.paths.values())


def numbered(model: nn.Module) -> dict[nn.Module, int]:
    """The modules of a model by their order in it, which is that of its copies as well."""
    return {module: i for i, module in enumerate(model.modules())}


def _layer(model: nn.Module, path: str, factors: Factors) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise UserError(f"the adapter has an update for {path}, which the base does not have") from None
    if factors.kind != "linear" or factors.magnitude is not None or factors.bias is not None:
        raise UserError(f"the adapter's update of {path} is not a plain product (DoRA, a bias, an embedding)")
    weight = module._parameters.get("weight")
    shape = None if weight is None else {*weight.shape}
    if shape != {factors.A.shape[1], factors.B.shape[0]}:
        raise UserError(f"the adapter's update of {path} does not fit the base's layer")
    return module


Layout = list[tuple[int, tuple[int, ...], tuple[int, ...], float]]
"""For each update in its order: number of the layer, shapes of A and B, scale."""


class Mirror(Weights):
    """An adapter by its numbers: one that another process has, in memory that they share; or a copy.

    Args:
        flat: its numbers.
        gradient: theirs; None where it does not train.
        layout: of both.
        of: the adapter that it is a copy of; None leaves it without paths and configuration.
    """

    def __init__(
        self, flat: Tensor, gradient: Tensor | None, layout: Layout, of: Weights | None = None
    ) -> None:
        """Look at it."""
        self.flat, self.layout = flat, layout
        slopes = [(None, None)] * len(layout) if gradient is None else _views(gradient, layout)
        updates = [
            LowRank(*own, each[-1], *slope)
            for each, own, slope in zip(layout, _views(flat, layout), slopes, strict=True)
        ]
        self._layers = {each[0]: update for each, update in zip(layout, updates, strict=True)}
        if of is not None:
            self.config, self.paths = of.config, dict(zip(of.paths, updates, strict=True))


def _room(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // _ALIGNED) * _ALIGNED


def _views(flat: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for _, *shapes, _ in layout:
        pair = []
        for shape in shapes:
            pair.append(flat[start : start + math.prod(shape)].view(shape))
            start += _room(shape)
        yield pair[0], pair[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """One step of AdamW with decoupled decay.

    Args:
        learning_rate: of this step.
        beta1: of the average of gradients.
        beta2: of the average of their squares.
        eps: added to the root.
        weight_decay: times the learning rate, taken off every weight.
        grad_clip_norm: gradients are scaled down to this norm; 0 for never.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            low_enough = name not in ("beta1", "beta2") or value < 1
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 and low_enough):
                raise UserError(f"{name} cannot be {value!r}")


class Learner(Weights):
    """An adapter in training.

    Attributes:
        gradient: sum over all that was computed since the last step; laid out as `flat`.
        steps: taken so far.
    """

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        """Start with no gradient and no averages."""
        super().__init__(adapter, model)
        self.gradient = zeros(len(self.flat), self.flat.device)
        for f, (dA, dB) in zip(self.paths.values(), _views(self.gradient, self.layout), strict=True):
            f.dA, f.dB = dA, dB
        self.forget()

    def forget(self) -> None:
        """Begin the optimizer anew, without gradients."""
        self.steps = 0
        self._frozen: Weights | None = None
        self.gradient.zero_()
        self.mean = torch.zeros_like(self.flat)
        self.square = torch.zeros_like(self.flat)

    def step(self, adam: Adam) -> dict[str, float]:
        """Move, and set the gradient to zero.

        Returns:
            ``grad_norm``, before clipping.

        Raises:
            UserError: the gradient is not finite; nothing moves, and it is set to zero.
        """
        norm = float(torch.linalg.vector_norm(self.gradient))
        if not math.isfinite(norm):
            self.gradient.zero_()
            raise UserError("the gradient is not finite: the loss diverged; no step was taken")
        if 0 < adam.grad_clip_norm < norm:
            self.gradient.mul_(adam.grad_clip_norm / norm)
        self._frozen = None
        parameter = self.flat.requires_grad_()
        parameter.grad = self.gradient
        optimizer = torch.optim.AdamW(
            [parameter],
            lr=adam.learning_rate,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            fused=self.flat.device.type == "cpu",
        )
        optimizer.state[parameter] = {
            "step": torch.tensor(float(self.steps)),
            "exp_avg": self.mean,
            "exp_avg_sq": self.square,
        }
        optimizer.step()
        parameter.grad = None
        self.flat.requires_grad_(False)
        self.steps += 1
        self.gradient.zero_()
        return {"grad_norm": norm}

    def take(self, adapter: Adapter, moments: Mapping[str, Tensor] | None = None) -> None:
        """Become another adapter of the same make.

        Args:
            adapter: whose numbers to take.
            moments: result of `moments`; None begins the optimizer anew.

        Raises:
            UserError: it has other layers, ranks or scales.
        """
        mine = {path: (f.A.shape, f.B.shape, f.scale) for path, f in self.paths.items()}
        theirs = {path: (f.A.shape, f.B.shape, f.scale) for path, f in adapter.factors.items()}
        if mine != theirs:
            odd = sorted(path for path in {*mine, *theirs} if mine.get(path) != theirs.get(path))
            raise UserError(
                f"the weights are of another make: they differ at {odd[0]} and {len(odd) - 1} more"
            )
        for path, f in self.paths.items():
            f.A.copy_(adapter.factors[path].A)
            f.B.copy_(adapter.factors[path].B)
        self.forget()
        if moments is not None:
            self.mean.copy_(moments["mean"])
            self.square.copy_(moments["square"])
            self.steps = int(moments["steps"])

    def moments(self) -> dict[str, Tensor]:
        """AdamW's averages and its count, for a file."""
        return {"mean": self.mean, "square": self.square, "steps": torch.tensor(self.steps)}

    def frozen(self) -> Weights:
        """A copy of the weights as they are now, to sample from; the same one until they move."""
        if self._frozen is None:
            self._frozen = self.copied()
        return self._frozen

    def copied(self) -> Weights:
        """A copy that is nobody else's."""
        flat = zeros(len(self.flat), self.flat.device).copy_(self.flat)
        return Mirror(flat, None, self.layout, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """Settings by which an adapter is made.

    Args:
        rank: of each update.
        seed: of A's start; None draws one.
        train_unembed: adapt the output head.
        train_mlp: adapt the other linear layers of the blocks.
        train_attn: adapt those of attention.
    """

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


def start(model: nn.Module, make: Make, targets: Targets, *, name: str | None = None) -> Adapter:
    """A new adapter as a value: A drawn, B zero, α = 32.

    Args:
        model: the base, which stays as it is.
        make: which layers, and the rank.
        targets: the base's layers by their sort.
        name: of the base, for the file.

    Raises:
        UserError: no layer is left to adapt, or the rank is no rank.
    """
    if not isinstance(make.rank, int) or make.rank < 1:
        raise UserError(f"rank must be a whole number from 1 on, not {make.rank!r}")
    paths = targets.chosen(unembed=make.train_unembed, mlp=make.train_mlp, attn=make.train_attn)
    widest = max(min(model.get_submodule(path).weight.shape) for path in paths)  # type: ignore[union-attr]
    if make.rank > widest:
        raise UserError(f"rank={make.rank} is larger than any rank of the layers' weights, {widest}")
    config = LoraConfig(
        r=make.rank, lora_alpha=ALPHA, target_modules=targets.named(paths), task_type="CAUSAL_LM"
    )
    # A copy of the modules around the same parameters.
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    try:
        lorica.adapt(shared, config, seed=make.seed)
    except AdapterError as error:
        raise UserError(str(error)) from error
    made = lorica.extract(shared)
    if name is not None:
        made = replace(made, config=replace(made.lora, base_model_name_or_path=name))
    return made
