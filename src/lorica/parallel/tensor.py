"""Tensor parallel: a layer's weight split over ranks, which compute their parts of one product.

              W0            A            B            DoRA's m
    Colwise   by outputs    whole        by outputs   by outputs     y: each rank's outputs
    Rowwise   by inputs     by inputs    whole        whole          y: summed up over ranks

torch's own styles, told where the parameters of an adapted layer live.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from lorica.errors import ConfigError, StateError, listing, nearest
from lorica.layers import LoraLinear, SwappedModule, TiedFactor
from lorica.model.sharded import part_of
from lorica.parallel.sharding import settle
from lorica.state import adapted
from lorica.tree import walk

M = TypeVar("M", bound=nn.Module)


class _Style:
    """The base of both styles: an adapted layer's parameters, each in the module that holds it."""

    src_data_rank: Any
    split: ClassVar[Mapping[str, int]] = {}
    """Module inside the layer ("" for itself) and leaf → the dimension that is split; others are whole."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for leaf, parameter in module._parameters.items():
            dim = self.split.get(f"{name.partition('.')[0]}:{leaf}")
            if parameter is None or dim is None:
                continue  # torch makes it one that every rank has whole
            part = distribute_tensor(parameter, device_mesh, [Shard(dim)], src_data_rank=self.src_data_rank)
            module._parameters[leaf] = nn.Parameter(part, requires_grad=parameter.requires_grad)


class Colwise(_Style, ColwiseParallel):
    """`ColwiseParallel` for layers adapted or not: each rank has some of the outputs.

    Keyword Args:
        input_layouts: as `ColwiseParallel`.
        output_layouts: as `ColwiseParallel`; ``Replicate()`` gathers the outputs.
        use_local_output: as `ColwiseParallel`.

    Raises:
        StateError: once applied: the layer is adapted in a way that cannot be split.
    """

    split: ClassVar = {
        ":weight": 0,
        ":bias": 0,
        "lora_B:weight": 0,
        "lora_B:bias": 0,
        "lora_magnitude_vector:weight": 0,
    }

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_splits(module)
        return super()._apply(module, device_mesh)


class Rowwise(_Style, RowwiseParallel):
    """`RowwiseParallel` for layers adapted or not: each rank has some of the inputs.

    Keyword Args:
        input_layouts: as `RowwiseParallel`; ``Replicate()`` takes whole inputs.
        output_layouts: as `RowwiseParallel`.
        use_local_output: as `RowwiseParallel`.

    Raises:
        StateError: once applied: the layer is adapted in a way that cannot be split.
    """

    split: ClassVar = {":weight": 1, "lora_A:weight": 1}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_splits(module)
        return super()._apply(module, device_mesh)


def check_splits(module: nn.Module) -> None:
    """Refuse a layer whose adapter has no place in a split one.

    Raises:
        StateError: naming its class, and why.
    """
    if not isinstance(module, SwappedModule):
        return
    why = None
    if type(module).swapped_by is not LoraLinear:
        why = "tensor parallel splits plain adapted linear layers alone"
    elif any(isinstance(part, TiedFactor) for part in module.modules()):
        why = "its factors are an embedding's, transposed (ensure_weight_tying), and would be two"
    elif isinstance(module, LoraLinear) and any(module.lora_dropout.values()):
        why = "each rank would drop other inputs of it; set lora_dropout=0"
    if why is not None:
        raise StateError(f"a {type(module).__name__} cannot be split: {why}, or leave it out of the plan")


# What transformers' plans call them.
_STYLES: dict[str, Any] = {
    "colwise": lambda: Colwise(),
    "rowwise": lambda: Rowwise(),
    "colwise_gather_output": lambda: Colwise(output_layouts=Replicate()),
    "colwise_rep": lambda: Colwise(output_layouts=Replicate()),
    "rowwise_split_input": lambda: Rowwise(input_layouts=Replicate()),
    "rowwise_rep": lambda: Rowwise(input_layouts=Replicate()),
    "embedding_rowwise": lambda: Rowwise(input_layouts=Replicate()),
}
_LEFT = ("replicate", "replicated_with_grad_allreduce")
"""Modules that every rank has whole; what is frozen there has no gradients to add up."""


def split(model: M, mesh: DeviceMesh, plan: Mapping[str, str | ParallelStyle] | None = None) -> M:
    """Split an adapted model over the ranks of a mesh by tensor parallel, in place.

    Adapt first, then split, then `shard` over another dimension of the mesh, if there is one. Every rank gets
    the same rows.

    Args:
        model: adapted model, the same on every rank.
        mesh: ranks to split over, one dimension.
        plan: path of a module, with ``*`` for any number → style: torch's or lorica's, or ``"colwise"``,
            ``"rowwise"``, ``"colwise_gather_output"``, ``"rowwise_split_input"``. None takes transformers'
            own plan for the model (`tp_plan`).

    Returns:
        The same model.

    Raises:
        ConfigError: there is no plan; it names modules that the model does not have, or styles that lorica
            does not know.
        StateError: the model carries no adapter, is merged or split already; or a layer cannot be split.
    """
    root, state = adapted(model)
    state.check_unmerged("split the model")
    if part_of(root) is not None:
        raise StateError(
            f"this {type(root).__name__} is split or sharded already; split comes first, and once"
        )
    found = _styles(root, _own_plan(root) if plan is None else plan)
    parallelize_module(root, mesh, found)
    settle(root, state)
    return model


def _own_plan(root: nn.Module) -> dict[str, str]:
    """The plan that transformers has for a model."""
    config = getattr(root, "config", None)
    inner = dict(getattr(config, "base_model_tp_plan", None) or {})
    prefix = getattr(root, "base_model_prefix", "")
    if prefix and hasattr(root, prefix):
        inner = {f"{prefix}.{name}": style for name, style in inner.items()}
    outer = {name: style for name, style in (getattr(root, "_tp_plan", None) or {}).items() if style}
    plan = inner | outer
    if not plan:
        raise ConfigError(
            f"{type(root).__name__} has no plan of its own for tensor parallel; give one: "
            'split(model, mesh, {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})'
        )
    return plan


def _styles(root: nn.Module, plan: Mapping[str, str | ParallelStyle]) -> dict[str, ParallelStyle]:
    """Path → style.

    Raises:
        ConfigError: a pattern matches nothing, or a style is not known.
        StateError: a layer cannot be split.
    """
    modules = {place.path: place.module for place in walk(root) if place.path}
    found: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        if isinstance(style, str) and style not in (*_STYLES, *_LEFT):
            raise ConfigError(
                f"the plan has style {style!r} for {pattern!r}, which lorica does not know; it knows "
                f"{listing(map(repr, _STYLES))}, and takes torch's ParallelStyle"
            )
        wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        paths = [path for path in modules if wanted.fullmatch(path)]
        if not paths:
            raise ConfigError(
                f"the plan names {pattern!r}, which matches no module{nearest(pattern, modules)}"
            )
        if isinstance(style, str) and style in _LEFT:
            training = [p for p in paths if any(q.requires_grad for q in modules[p].parameters())]
            if training:
                raise ConfigError(
                    f"{listing(training)}: style {style!r} is for what is frozen, and it trains"
                )
            continue
        if style == "embedding_rowwise":  # computes the same whole
            paths = [p for p in paths if not isinstance(modules[p], SwappedModule) and _alone(modules, p)]
        for path in paths:
            check_splits(modules[path])
            found[path] = _STYLES[style]() if isinstance(style, str) else style
    return found


def _alone(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether no other module has the same weight."""
    weight = modules[path]._parameters.get("weight")
    return sum(module._parameters.get("weight") is weight for module in modules.values()) == 1
