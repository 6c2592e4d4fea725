"""A model made on the meta device, without values: its base's come from files, its adapters' from their seed.

    with torch.device("meta"): model        shapes alone, no memory
    adapt ──▶ shard ──▶ materialize         each rank: its parts of the base, A and B, then DoRA's magnitudes

So no rank ever holds the model whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica import inits
from lorica.errors import AdapterError, FileError, StateError, lines, listing
from lorica.inits.draws import Drawn
from lorica.layers.quantized import quantizer_of
from lorica.model.sharded import part_of
from lorica.parallel.sources import Files, FromRankZero, Source
from lorica.piece import Beginning
from lorica.state import AdapterState, adapted
from lorica.tree import assign, join, owner_of, walk

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def materialize(
    model: M,
    base: str | Path | Mapping[str, Tensor] | None,
    *,
    seed: int,
    device: torch.device | str | None = None,
) -> M:
    """Give a model that was made on the meta device its values, in place; every rank must call this.

    A and B start as `lorica.adapt` with this seed has them on a whole model. Adapters that came from a file
    (`lorica.load`) get their values from it once more: call `lorica.load_weights` after this.

    Args:
        model: adapted model, sharded, split or neither.
        base: folder of safetensors with the base's weights, of which each rank reads its parts; or a
            `state_dict()` on rank 0, and None on the other ranks.
        seed: fixes how the adapters start.
        device: where the values go; None takes that of the model's mesh, or the CPU.

    Returns:
        The same model.

    Raises:
        FileError: the folder holds no safetensors, or they lack tensors of the model, or have them in other
            shapes; all of them are named, and the model is untouched.
        ConfigError: rank 0 gave no state.
        AdapterError: an adapter starts from W0 (PiSSA, OLoRA, ...), which had no values when it was put on.
        StateError: the model carries no adapter; it is quantized; or it has buffers that are in no file, and
            transformers does not make.
    """
    root, state = adapted(model)
    state.check_unmerged("give the model values")
    _check(root, state)
    part = part_of(root)
    where = torch.device(device or ("cpu" if part is None else part.device_mesh.device_type))
    if isinstance(base, str | Path):
        source: Source = Files(base, [p.path for p in walk(root) if "weight" in p.module._parameters])
    else:
        source = FromRankZero(base, where)
    found = _find(root, state, source)
    made = {name: t for name, t in _base(root, state) if t.is_meta and name not in found}
    for tensor in _all(root, state):
        _give_room(tensor, where)
    _make_buffers(root, {n: t for n, t in made.items() if not isinstance(t, Parameter)})
    for name, key in found.items():
        tensor = state.base_tensor(root, name)
        assign(tensor, source.read(key, tensor))
    for name, config in state.configs.items():
        at = Beginning(root, state, config, seed)
        for piece in state.pieces[name]:
            if name in state.unfilled:
                for held in piece.tensors(name):
                    held.tensor.fill_(torch.nan)
            else:
                for tensor, value in piece.begin_again(name, at):
                    assign(tensor, value)
    return model


def _check(root: nn.Module, state: AdapterState) -> None:
    """Refuse what has no start without its base's values.

    Raises:
        AdapterError: an adapter's start is made from them.
        StateError: the base's weights are packed.
    """
    for name, config in state.configs.items():
        lora, _ = config.members()
        if lora is not None and not isinstance(inits.of(lora), Drawn) and name not in state.unfilled:
            raise AdapterError(
                f"{name!r} starts by init_lora_weights={lora.init_lora_weights!r}, from weights that have "
                "no values on the meta device; save it where the model is whole, lorica.load it here, and "
                "after materialize lorica.load_weights"
            )
    packed = [place.path for place in walk(root) if quantizer_of(place.module) is not None]
    if packed:
        raise StateError(
            f"{listing(packed, limit=3)} is quantized, and its values come from the library that packed it; "
            "load a quantized base whole on each rank, then adapt and shard it"
        )


def _base(root: nn.Module, state: AdapterState) -> Iterator[tuple[str, Tensor]]:
    """The base's own parameters and buffers by name, whatever stands in their places."""
    for path, module, _ in walk(root):
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is not None:
                    name = join(path, leaf)
                    yield name, state.originals.get(name, tensor)


def _all(root: nn.Module, state: AdapterState) -> Iterator[Tensor]:
    """Every tensor of the model and of its adapters."""
    yield from root.parameters()
    yield from root.buffers()
    yield from state.originals.values()
    for name in state.configs:
        for piece in state.pieces[name]:
            yield from (held.tensor for held in piece.tensors(name))


def _find(root: nn.Module, state: AdapterState, source: Source) -> dict[str, str]:
    """The model's name → the source's, each tensor once.

    Raises:
        FileError: parameters are not there, or of another shape.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in _base(root, state):
        if tensor.is_meta:
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    found: dict[str, str] = {}
    problems = []
    for key, aliases in names.items():
        tensor = tensors[key]
        there = [(name, place) for name in aliases if (place := source.place(name)) is not None]
        if there:
            name, place = there[0]
            if source.shapes[place] != tuple(tensor.shape):
                problems.append(
                    f"shape of {place}: {source.shapes[place]} in the base's files, {tuple(tensor.shape)} in "
                    "the model"
                )
            found[name] = place
        elif isinstance(tensor, Parameter):
            problems.append(f"missing: {aliases[0]}")
    if problems:
        raise FileError(
            f"the base's values do not fit this {type(root).__name__}. Where its library arranges files "
            "anew as it loads them, or makes a new head, give rank 0's state_dict() of a model that was "
            f"loaded there, and None on the other ranks:\n{lines(problems)}"
        )
    return found


def _give_room(tensor: Tensor, device: torch.device) -> None:
    """Memory for a tensor without values; whoever holds it, holds it still."""
    if not tensor.is_meta:
        return
    room: Tensor = torch.empty_like(tensor, device=device)
    if isinstance(tensor, Parameter):
        room = Parameter(room, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, room)


def _make_buffers(root: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Make the buffers that no file has, such as rotary frequencies, as transformers does.

    Raises:
        StateError: nothing is known of how they are made.
    """
    for tensor in buffers.values():
        tensor.fill_(_no_value(tensor))
    for path in dict.fromkeys(name.rpartition(".")[0] for name in buffers):
        maker = _maker(root, path)
        if maker is not None:
            maker(owner_of(root, f"{path}.")[0])
    left = [name for name, tensor in buffers.items() if _is_unmade(tensor)]
    if left:
        raise StateError(
            f"{listing(left)}: buffers that no file holds, and that lorica cannot make again; give them "
            "their values before this (model.rope.frequencies = ...), or make the model with real buffers "
            "(accelerate.init_empty_weights())"
        )


def _no_value(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool or tensor.is_complex():
        return 0
    return torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min


def _is_unmade(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool or tensor.is_complex():
        return True
    bare = tensor.isnan() if tensor.is_floating_point() else tensor == torch.iinfo(tensor.dtype).min
    return bool(bare.any())


def _maker(root: nn.Module, path: str) -> Any:
    """The function that starts a module: a method of the innermost transformers model around it."""
    found, module = None, root
    for part in ["", *path.split(".")]:
        module = module._modules[part] if part else module
        assert module is not None
        found = getattr(module, "_init_weights", found)
    return found
