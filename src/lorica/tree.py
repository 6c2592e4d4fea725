"""A model as a tree of modules: every module and parameter of the base by its path.

walk        each module of the base once, without what lorica added
module_at   a path → its module
ending_in   names → the modules whose paths end with them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import DataParallel, Parameter
from torch.nn.parallel import DistributedDataParallel

from lorica.errors import StateError

_COMPILED = "_orig_mod"
"""Name of the module that `torch.compile` wraps."""


class Place(NamedTuple):
    """A module, where it stands, and what holds it (None for the model itself)."""

    path: str
    module: nn.Module
    parent: nn.Module | None


def walk(root: nn.Module) -> Iterator[Place]:
    """Every module of the base once, in registration order, without what lorica added.

    A module that `torch.compile` wrapped stands under the name of its wrapper.
    """
    seen: set[nn.Module] = set()
    ahead = [Place("", uncompiled(root), None)]
    while ahead:
        place = ahead.pop()
        path, module, _ = place
        if module in seen:
            continue
        seen.add(module)
        yield place
        if module._modules:
            prefix = f"{path}." if path else ""
            added: Any = module.own_modules if "adapter_state" in module.__dict__ else ()
            ahead += [
                Place(prefix + name, uncompiled(child), module)
                for name, child in reversed(module._modules.items())
                if child is not None and name not in added
            ]


def base_parameters(root: nn.Module) -> dict[str, Parameter]:
    """The base's own parameters by name; one that is tied stands under each of its names."""
    return {
        join(place.path, leaf): parameter
        for place in walk(root)
        for leaf, parameter in place.module._parameters.items()
        if parameter is not None
    }


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module of that name; wrappers that `torch.compile` put around modules are no part of names."""
    module = uncompiled(root)
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        module = uncompiled(child)
    return module


def owner_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter or buffer of that name, and its name there."""
    owner, _, leaf = path.rpartition(".")
    return module_at(root, owner), leaf


def parameter_at(root: nn.Module, path: str) -> Parameter:
    """The parameter of that name, whatever an attribute shows instead."""
    owner, leaf = owner_of(root, path)
    parameter = owner._parameters[leaf]
    assert parameter is not None
    return parameter


def table_of(module: nn.Module, leaf: str) -> Any:
    """The table in which a module has a parameter or buffer of that name."""
    return module._buffers if leaf in module._buffers else module._parameters


def tensor_at(root: nn.Module, path: str) -> Any:
    """The parameter or buffer of that name, whatever an attribute shows instead.

    Raises:
        StateError: it has become a computed attribute.
    """
    owner, leaf = owner_of(root, path)
    table = table_of(owner, leaf)
    if leaf not in table:
        raise StateError(
            f"{path} is computed since it was adapted (prune, weight_norm, parametrize), so it cannot be "
            "exchanged for the adapter's or the base's own; make it a parameter first (prune.remove, "
            "remove_parametrizations)"
        )
    return table[leaf]


def put_at(root: nn.Module, path: str, tensor: Any, dtype: torch.dtype | None = None) -> Any:
    """Put a parameter or buffer where `path` says; returns the one that was there.

    It follows what was there to the device and dtype that the model moved to in the meantime.

    Args:
        root: the model.
        path: name of the parameter or buffer.
        tensor: what comes.
        dtype: to give it, where that is not the dtype of what was there.
    """
    before = tensor_at(root, path)
    assert before is not None
    dtype = dtype or before.dtype
    if tensor.device != before.device or tensor.dtype != dtype:
        tensor.data = tensor.data.to(before.device, dtype)
    owner, leaf = owner_of(root, path)
    table_of(owner, leaf)[leaf] = tensor
    return before


def is_sharded(tensor: object) -> bool:
    """Whether this is one rank's part of a tensor that several hold (`fully_shard`, tensor parallel)."""
    return type(tensor).__name__ == "DTensor"  # to import it takes half a second


def whole(tensor: Tensor) -> Tensor:
    """A tensor as all ranks have it together; they must all ask. One that is no part is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor.detach()
    return part.full_tensor()


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A value as another tensor is laid out over ranks; each rank has the whole value, and nothing is sent.

    Args:
        value: in the whole shape.
        like: what it is for.
    """
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    part: Any = like
    value = value.to(device=part.to_local().device)
    return distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor, or this rank's share of it into its part; nothing is sent.

    Args:
        tensor: what is written to.
        value: whole, on every rank; or in parts as `tensor` is.
    """
    if not is_sharded(tensor) or is_sharded(value):
        tensor.copy_(value)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    part: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(value.shape, part.device_mesh, part.placements)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        value = value.narrow(dim, min(start, value.shape[dim]), size)
    part.to_local().copy_(value)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside the wrapper that `torch.compile(module)` returns; others are returned as they are."""
    while (inside := module._modules.get(_COMPILED)) is not None:
        module = inside
    return module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that run one model: `torch.compile`'s and the data-parallel ones."""
    while True:
        model = uncompiled(model)
        if not isinstance(model, (DataParallel, DistributedDataParallel)):
            return model
        model = model.module


def as_uncompiled(name: str) -> str:
    """A live name of a tensor or module without what `torch.compile` put into it."""
    return name.replace(f"{_COMPILED}.", "")


def model_type(root: nn.Module) -> str | None:
    """The name of a model's architecture in its configuration; None where it has none."""
    config: Any = getattr(root, "config", None)
    found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    if not isinstance(found, str) and not isinstance(config, dict) and hasattr(config, "to_dict"):
        told = config.to_dict()
        found = told.get("model_type") if isinstance(told, dict) else None
    return found if isinstance(found, str) else None


def output_head(root: nn.Module) -> nn.Module | None:
    """The output head of a transformers model, if it says so."""
    return _asked(root, "get_output_embeddings")


def input_embedding(root: nn.Module) -> nn.Module | None:
    """The input embedding of a transformers model, if it says so."""
    return _asked(root, "get_input_embeddings")


def _asked(root: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(root, getter)()  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def join(*parts: str) -> str:
    """A dotted path from its non-empty parts."""
    return ".".join(part for part in parts if part)


def ending_in(places: Iterable[Place], names: Iterable[str]) -> list[Place]:
    """The places of which a name is the path, or its end from a dot on."""
    ends = tuple(f".{name}" for name in names)
    return [place for place in places if f".{place.path}".endswith(ends)]


def within_any(path: str, outer: Iterable[str]) -> bool:
    """Whether `path` is one of the given paths, or inside one."""
    return any(path == o or path.startswith(f"{o}.") for o in outer)


def outside(places: list[Place], outer: Collection[str]) -> list[Place]:
    """The places that are none of the given paths and inside none."""
    return [place for place in places if not within_any(place.path, outer)] if outer else places


def outermost(places: Iterable[Place]) -> dict[str, nn.Module]:
    """Path → module, without those that are inside another."""
    found = {place.path: place.module for place in places}
    return {path: module for path, module in found.items() if not within_any(path, found.keys() - {path})}


def tied_with(places: Iterable[Place], module: nn.Module) -> list[str]:
    """Paths of the modules whose weight is that of `module`, its own included."""
    weight = module._parameters.get("weight")
    return [p.path for p in places if weight is not None and p.module._parameters.get("weight") is weight]


def only_holds(place: Place, tied: Collection[str]) -> bool:
    """Whether an embedding only holds the table in which others look up, as T5's `shared` does.

    Args:
        place: of the embedding.
        tied: paths of the other embeddings with the same table.
    """
    around, _, _ = place.path.rpartition(".")
    inside = f"{around}." if around else ""
    return bool(tied) and all(p.startswith(inside) and "." in p.removeprefix(inside) for p in tied)


def shortest_suffixes(chosen: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The shortest dotted suffixes that match all chosen paths and no other."""
    chosen = list(chosen)
    available = Counter(suffix for path in everything for suffix in _suffixes(path))
    wanted = Counter(suffix for path in chosen for suffix in _suffixes(path))
    # The whole path is the last resort: it is unambiguous unless another path ends with it.
    return sorted({next((s for s in _suffixes(path) if wanted[s] == available[s]), path) for path in chosen})


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def tails(paths: Iterable[str]) -> list[str]:
    """The last names of dotted paths, each once."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
