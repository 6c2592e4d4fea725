"""An adapter on a model as a value and as files: loops over its pieces.

extract, save   pieces ──▶ tensors        load_weights   a file's tensors ──▶ the same pieces
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.checkpoint.peft import as_path
from lorica.checkpoint.peft import read as read_folder
from lorica.config import AdapterConfig, LoraConfig, changes_base
from lorica.errors import AdapterError, LoricaWarning, lines
from lorica.model.pretrained.classes import names_of, take
from lorica.model.pretrained.vocabulary import with_resized_tables
from lorica.model.sharded import once
from lorica.piece import Contents
from lorica.pieces import fill, misfits
from lorica.state import AdapterState, adapted, in_group
from lorica.tree import as_uncompiled, base_parameters, is_sharded, whole


def extract(
    model: nn.Module, name: str | None = None, *, state_dict: Mapping[str, Tensor] | None = None
) -> Adapter:
    """An adapter of a model as a value: an update of the base's own weights.

    It shares memory with the model, except where its start was subtracted from W0: there the start is added
    with the opposite sign, at twice the rank. (LoftQ's base is no such difference; its factors come as they
    are.) On a sharded model every rank must call this and receives the whole adapter.

    Args:
        model: adapted model.
        name: the adapter's name; None takes the only one, or the only active one.
        state_dict: live name → values to take instead, as sharded training gathers them.

    Returns:
        The adapter: factors by module path, and what is trained whole by its name in the base.

    Raises:
        AdapterError: no such adapter, or more than one to choose from.
        StateError: an adapter is merged, or none was ever put on.
    """
    _, state = adapted(model)
    live = extract_live(model, name, state_dict=state_dict)
    starts = {
        piece.path: (piece.start.A, piece.start.B)
        for piece in _with_starts(state, state.one(name))
        if piece.path in live.factors
    }
    return live.with_starts(starts) if starts else live


def _with_starts(state: AdapterState, name: str) -> Iterator[Any]:
    """The pieces of an adapter whose starts were subtracted from W0."""
    pieces: list[Any] = state.placing(name)
    yield from (piece for piece in pieces if piece.residual and piece.start.A is not None)


def extract_live(
    model: nn.Module, name: str | None = None, *, state_dict: Mapping[str, Tensor] | None = None
) -> Adapter:
    """As `extract`, but always the live tensors, even where the start was subtracted from W0."""
    root, state = adapted(model)
    name = state.one(name)
    state.check_unmerged("take an adapter out")
    gathered, shared = state_dict or {}, in_group()
    if any(as_uncompiled(key) != key for key in gathered):
        gathered = {as_uncompiled(key): tensor for key, tensor in gathered.items()}

    def value(live: str | None, tensor: Tensor) -> Tensor:
        tensor = tensor if live is None else gathered.get(live, tensor)
        return (whole(tensor) if shared else tensor).detach()

    contents = Contents({}, {}, {})
    for piece in state.pieces_in(root, name):
        piece.give(name, contents, value)
    names = names_of(root, state, name, contents.extras) if contents.extras else None
    return Adapter(state.configs[name], *contents, classes=names)


def save(
    model: nn.Module, directory: str | Path, name: str | None = None, *, as_trained: bool = False
) -> Path:
    """Write an adapter to a folder in PEFT's format.

    The files are `adapter_config.json`, `adapter_model.safetensors` and `README.md`. Nothing touches the
    network. A folder that is overwritten holds either the old adapter or the new one, or refuses to load.

    The file is an update of the base as it was before `adapt`. Where the start was subtracted from W0, it is
    added with the opposite sign, at twice the rank, so any reader of PEFT's files computes the same. lorica
    separates the two again to train further.

    If the vocabulary of a transformers model was resized after the base was saved, the file also holds the
    embedding tables, whose new rows no reader has. `load` puts them on a model of that size.

    On a sharded model every rank must call this; rank 0 writes.

    Args:
        model: adapted model.
        directory: the folder; created if it does not exist.
        name: the adapter's name; None takes the only one, or the only active one.
        as_trained: write A and B as they train, with the original `init_lora_weights`: half the size, and
            PEFT's default. A reader must then compute the same start from the same base, which PEFT does for
            ``"pissa"`` and ``"olora"`` and cannot do for the others.

    Returns:
        The folder.

    Raises:
        AdapterError: no such adapter, more than one to choose from, or NaN or infinity in its tensors.
        FileError: the folder cannot be written.
        StateError: an adapter is merged, or none was ever put on.
    """
    adapter = extract_live(model, name) if as_trained else extract(model, name)
    root, _ = adapted(model)
    content = with_resized_tables(adapter, root) if hasattr(root, "config") else adapter
    if not in_group():
        return checkpoint.write(content, directory)
    return once(root, lambda: checkpoint.write(content, directory), directory)


def load_weights(model: nn.Module, directory: str | Path, name: str | None = None) -> None:
    """Give an adapter on the model the values saved in a folder, as a resumed training does.

    Args:
        model: adapted model.
        directory: folder that `save` wrote for an adapter of the same kind.
        name: the adapter's name; None takes the only one, or the only active one.

    Raises:
        FileError: a file is missing or damaged.
        AdapterError: lists all that does not fit; the model is untouched.
    """
    here = as_path(directory)
    overwrite(model, read_folder(here) if here.is_dir() else checkpoint.read(directory), name)


def overwrite(model: nn.Module, adapter: Adapter, name: str | None = None, *, strict: bool = True) -> None:
    """Give an adapter on the model the values of another of the same kind.

    Which adapter acts, what trains and the training mode stay the same.

    Args:
        model: adapted model.
        adapter: the adapter with the new values.
        name: the name of the adapter on the model; None takes the only one, or the only active one.
        strict: whether other scales, tokens or starts are errors; otherwise they are warnings.

    Raises:
        AdapterError: lists all that is missing, unexpected, of another shape or has another meaning; the
            model is untouched.
        StateError: an adapter is merged, or none was ever put on.

    Warns:
        LoricaWarning: unless `strict`, with the list of what means something else here.
    """
    fitting(model, adapter, name, strict=strict)()


def fitting(
    model: nn.Module, adapter: Adapter, name: str | None = None, *, strict: bool = True
) -> Callable[[], None]:
    """`overwrite` in two steps: this does what can fail, and returns a function that writes the values."""
    root, state = adapted(model)
    adapter.check_finite()
    if adapter.stacks is not None:
        raise AdapterError(
            "these factors of stacked experts are as an older PEFT computed with them; lorica.load the "
            "adapter on its base"
        )
    name = state.one(name)
    state.check_unmerged("load values into an adapter")
    begun, starts, given = list(_with_starts(state, name)), {}, adapter
    if begun:
        config = state.configs[name]
        assert isinstance(config, LoraConfig)
        if all(f.r == 2 * config.rank(path) for path, f in adapter.factors.items()):
            # A file that other tools rewrote no longer says how it was trained, but its ranks show it.
            adapter = dataclasses.replace(adapter, trained_as=adapter.trained_as or config)
        if adapter.trained_as is not None:
            adapter, starts = adapter.without_starts()
    pieces, new = state.pieces_in(root, name), adapter.named_tensors()
    missing, unexpected, shapes = misfits(pieces, name, new, "on the model")
    tables = _tables(root, new) if unexpected else set()
    problems = [
        *(f"missing: {key}" for key in missing),
        *(f"unexpected: {key}" for key in unexpected if key not in tables),
        *shapes.values(),
    ]
    problems = problems or _torn(state, name, new)
    unlike = list(dict.fromkeys(line for piece in pieces for line in piece.unlike(root, name, given)))
    unlike += _base(state.configs[name], adapter.config, starts)
    if problems or (unlike and strict):
        raise AdapterError(f"the adapter does not fit the one on the model:\n{lines([*problems, *unlike])}")
    if unlike:
        warnings.warn(
            f"the values come from an adapter of another make than the one on the model:\n{lines(unlike)}",
            LoricaWarning,
            stacklevel=4,
        )

    @torch.no_grad()
    def write() -> None:
        take(state, name, given)
        fill(pieces, name, new)
        state.unfilled.discard(name)
        for piece in begun:
            if piece.path in starts:
                piece.restart(root, state, name, *starts[piece.path])

    return write


def _tables(root: nn.Module, new: Mapping[str, Tensor]) -> set[str]:
    """The tables of a resized vocabulary that a file holds besides the trained tensors: the base's own."""
    base = base_parameters(root)
    return {
        key
        for key, tensor in new.items()
        if key in base and base[key].shape == tensor.shape and _equal(tensor, whole(base[key].detach()))
    }


def _equal(tensor: Tensor, base: Tensor) -> bool:
    return torch.equal(tensor.to(base), base)


def _base(ours: AdapterConfig, theirs: AdapterConfig, starts: Mapping[str, object]) -> Iterator[str]:
    """Factors trained beside another weight than the model's, without the start that would give it."""
    mine, its = (c.init_lora_weights if isinstance(c, LoraConfig) else True for c in (ours, theirs))
    if mine != its and (changes_base(mine) or changes_base(its)) and not starts:
        yield f"init_lora_weights: {its!r} in the adapter, {mine!r} on the model; each means another base"


def _torn(state: AdapterState, name: str, new: Mapping[str, Tensor]) -> list[str]:
    """Problems where two names share one tensor and the adapter has different values for them."""
    live = {held.key: held.tensor for piece in state.pieces[name] for held in piece.tensors(name)}
    first: dict[int, str] = {}
    problems = []
    for key, tensor in live.items():
        if key not in new:
            continue
        other = first.setdefault(id(tensor) if is_sharded(tensor) else tensor.data_ptr(), key)
        value = new[other] if _laid_out_alike(live[other], tensor) else new[other].mT
        if other != key and tensor.numel() and not torch.equal(new[key], value):
            problems.append(f"{key} and {other} are one on the model, and differ in the adapter")
    return problems


def _laid_out_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in the same memory are equal, and not each other's transpose."""
    # Strides distinguish the two only in a matrix with several rows and columns.
    square = one.ndim == 2 and one.shape[0] == one.shape[1]
    return one.shape == other.shape and (not square or one.stride() == other.stride())
