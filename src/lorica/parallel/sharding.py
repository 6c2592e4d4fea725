"""Sharding an adapted model with `fully_shard` (FSDP2), and gathering its adapter.

    adapt ──▶ shard: each block, then the rest ──▶ train ──▶ lorica.save, on every rank; rank 0 writes

Between passes each rank holds a part of every parameter; a block's are gathered while it computes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Parameter

from lorica.adapter import Adapter
from lorica.errors import ConfigError, StateError, listing
from lorica.model import extract
from lorica.model.sharded import blocks_of, class_names
from lorica.model.watch.agreement import compare_ranks
from lorica.pieces.copies import ParameterCopy
from lorica.pieces.plugins.residual import Remainder
from lorica.state import AdapterState, adapted
from lorica.tree import is_sharded, owner_of, parameter_at, spread, walk

M = TypeVar("M", bound=nn.Module)


def shard(
    model: M,
    mesh: DeviceMesh | None = None,
    *,
    precision: torch.dtype | MixedPrecisionPolicy | None = None,
    blocks: Iterable[str | nn.Module] | None = None,
    reshard: bool = True,
) -> M:
    """Shard an adapted model over the ranks of a mesh, in place, block by block.

    What its adapters hold is sharded with the weights beside it. Make the optimizer after this.

    Args:
        model: adapted model, the same on every rank; on the meta device too (see `materialize`). Where it was
            split by tensor parallel, that comes first (see `split`).
        mesh: ranks to shard over, one dimension; of two, the first holds replicas (HSDP). None takes all
            ranks, on the accelerator if there is one.
        precision: dtype that blocks compute in; gradients are then averaged in float32. Or a policy of
            torch's. None computes in each weight's own dtype.
        blocks: what is gathered as one: names of classes, or modules. None takes what the architecture names
            (`_no_split_modules`), or else the members of its lists of modules.
        reshard: free a block's weights after its forward pass, and gather them again for the backward pass.

    Returns:
        The same model.

    Raises:
        StateError: the model carries no adapter, adapters are merged, or it was sharded before; there is no
            process group; or parameters cannot be sharded.
        ConfigError: no block is of a class that `blocks` names.
    """
    root, state = adapted(model)
    state.check_unmerged("shard the model")
    if not distributed.is_initialized():
        raise StateError(
            "sharding needs a process group: start the script with torchrun, and call "
            "torch.distributed.init_process_group() first"
        )
    if any("_is_fsdp_managed_module" in module.__dict__ for module in root.modules()):
        raise StateError(f"this {type(root).__name__} was sharded before")
    units = [*_blocks(root, blocks), root]
    _check(root, units)
    settings: dict[str, Any] = {
        "mesh": mesh or _all_ranks(),
        "mp_policy": _policy(precision),
        "reshard_after_forward": reshard,
    }
    for parameter in root.parameters():
        parameter.data = parameter.data.contiguous()
    name = type(root).__name__
    for unit in units:
        fully_shard(unit, **settings)
    vars(root)["_get_name"] = functools.partial(str, name)  # by which transformers' Trainer knows its loss
    settle(root, state)
    compare_ranks(root, state)
    return model


def gather(model: nn.Module, name: str | None = None) -> Adapter:
    """The adapter of a sharded model as a value, in the CPU's memory; every rank must call this.

    The base is not gathered. `lorica.extract` gives the same on the model's device; `lorica.save` writes it.

    Args:
        model: adapted model, sharded or split.
        name: of the adapter; None takes the only one, or the only active one.

    Returns:
        The adapter, the same on every rank.

    Raises:
        AdapterError: no such adapter, or more than one to choose from.
        StateError: none was ever put on.
    """
    found = extract(model, name)

    def kept(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().to("cpu", copy=True)

    factors = {
        path: dataclasses.replace(f, A=kept(f.A), B=kept(f.B), magnitude=kept(f.magnitude), bias=kept(f.bias))
        for path, f in found.factors.items()
    }
    extras = {key: kept(tensor) for key, tensor in found.extras.items()}
    added = {key: kept(tensor) for key, tensor in found.added.items()}
    return dataclasses.replace(found, factors=factors, extras=extras, added=added)


def _all_ranks() -> DeviceMesh:
    device = torch.accelerator.current_accelerator()
    return init_device_mesh("cpu" if device is None else device.type, (distributed.get_world_size(),))


def _policy(precision: torch.dtype | MixedPrecisionPolicy | None) -> MixedPrecisionPolicy:
    if isinstance(precision, MixedPrecisionPolicy):
        return precision
    reduced = None if precision is None else torch.float32
    return MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=reduced)


def _blocks(root: nn.Module, wanted: Iterable[str | nn.Module] | None) -> list[nn.Module]:
    """The modules that are gathered as one, the inner before the outer.

    Raises:
        ConfigError: none is of a class that is named.
    """
    if wanted is None:
        return list(reversed(dict.fromkeys(blocks_of(root))))
    modules, given = [place.module for place in walk(root)][1:], list(wanted)
    have = {name for module in modules for name in class_names(module)}
    unknown = [name for name in given if isinstance(name, str) and name not in have]
    if unknown:
        raise ConfigError(
            f"blocks names {listing(unknown)}, and no module of this {type(root).__name__} is of such a class"
        )
    names = {name for name in given if isinstance(name, str)}
    one_by_one = {id(module) for module in given if isinstance(module, nn.Module)}
    found = [m for m in modules if not class_names(m).isdisjoint(names) or id(m) in one_by_one]
    return list(reversed(found))


def _check(root: nn.Module, units: list[nn.Module]) -> None:
    """Refuse parameters that `fully_shard` cannot take.

    Raises:
        StateError: naming them.
    """
    single = [name for name, parameter in root.named_parameters() if parameter.dim() == 0]
    if single:
        raise StateError(
            f"{listing(single)} are single numbers, which cannot be sharded; make them tensors of shape (1,)"
        )
    scaled = [n for n, parameter in root.named_parameters() if type(parameter).__name__ == "Int8Params"]
    if scaled:
        raise StateError(
            f"{listing(scaled, limit=3)} are in bitsandbytes' int8, whose scales stand beside the weight and "
            "are lost when it is sharded; load the base in nf4 or fp4, or as it is"
        )
    taken: set[Parameter] = set()
    for unit in units:
        own = {name: p for name, p in unit.named_parameters() if p.requires_grad and p not in taken}
        taken.update(unit.parameters())
        dtypes = {p.dtype for p in own.values()}
        if len(dtypes) > 1:
            first = [next(name for name, p in own.items() if p.dtype == dtype) for dtype in dtypes]
            raise StateError(
                f"{listing(first)} of one {type(unit).__name__} train in different dtypes, and a block is "
                "averaged in one; give them the same (model.float() before lorica.adapt)"
            )


@torch.no_grad()
def settle(root: nn.Module, state: AdapterState) -> None:
    """Have adapters hold a part, too, of what they have put in W0's place, and of the W0 they set aside."""
    for path, original in state.originals.items():
        stands = parameter_at(root, path)
        if is_sharded(stands):
            state.originals[path] = Parameter(spread(original.detach(), stands), requires_grad=False)
    for name in state.placed:
        for piece in state.placing(name):
            for path in piece.stand_ins(name):
                owner, leaf = owner_of(root, path)
                stands = owner._parameters.get(leaf)
                if stands is not None and is_sharded(stands):
                    if isinstance(piece, Remainder):
                        piece.start.weight = stands
                    elif isinstance(piece, ParameterCopy):
                        piece.parameter = stands
