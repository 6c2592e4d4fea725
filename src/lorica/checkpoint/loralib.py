"""loralib's checkpoints, both ways.

    <path>.lora_A   (r, d_in)    <path>.lora_B   (d_out, r)    and other tensors by their names in the model

A loralib file holds neither alpha nor the kinds of its layers: both are in the script that trained it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.adapter import TOKEN_ROWS, Adapter, Factors
from lorica.checkpoint.atomic import replace_files, save
from lorica.checkpoint.derived import derived_config
from lorica.checkpoint.foreign import by_names
from lorica.checkpoint.fused import Parts, ends_with, fused_parts, groups, packed, unpacked
from lorica.errors import AdapterError, ConfigError, FileError, lines, listing, nearest
from lorica.reading import load, named_tensors

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")
_WRAPPERS = ("model_state_dict", "state_dict")  # keys under which training scripts keep the tensors


def read(
    path: str | Path,
    lora_alpha: float | None = None,
    *,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    split: Mapping[str, Sequence[str | None]] | None = None,
    embeddings: Iterable[str] = (),
    **settings: Any,
) -> Adapter:
    """Read a checkpoint that ``lora_state_dict`` made.

    Args:
        path: the file (pickled or safetensors; nothing in it is executed), or a folder with one.
        lora_alpha: the numerator of the scale α/r that the layers were made with; it is not in the file.
        enable_lora: name of a MergedLinear → its `enable_lora`, if the model's weight is fused too. That
            weight gets one update of rank r · (number of Trues), which is exactly the same function.
        split: name of a MergedLinear → the names of the model's own projections, None for one without an
            update, if the model has a module per projection: ``{"c_attn": ["q_proj", None, "v_proj"]}``.
        embeddings: names of the layers that are embeddings; their factors look like a linear layer's.
        settings: other fields of the adapter's `LoraConfig`, such as `task_type` and
            `base_model_name_or_path`. `target_modules` and `modules_to_save` follow from the names in the
            file, unless given.

    Returns:
        The adapter, on the CPU; tensors keep their dtype.

    Raises:
        FileError: there is no such file, it is damaged, or another library's.
        ConfigError: `lora_alpha` is missing, or a setting is wrong.
        AdapterError: lists what in it is not a loralib adapter's.
    """
    file = _file(Path(path))
    tensors = _load(file)
    own = any(name.endswith((".lora_A", ".lora_B")) for name in tensors)
    if not own and (other := by_names(tensors)) is not None:
        raise FileError(f"{file} is {other}; this reads loralib's checkpoints")
    if own and lora_alpha is None:
        raise ConfigError(
            f"{file} is a checkpoint of loralib's, which does not hold lora_alpha; the update is alpha / r "
            "times B·A, and only the script that trained it knows alpha. Give it: --alpha on the command "
            "line, lora_alpha= in Python"
        )
    try:
        alpha = 1.0 if lora_alpha is None else lora_alpha
        adapter = from_tensors(
            tensors, alpha, fused_parts(enable_lora, split), embeddings=embeddings, **settings
        )
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from None
    adapter.check_finite()
    return adapter


def write(
    adapter: Adapter,
    path: str | Path,
    *,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    split: Mapping[str, Sequence[str | None]] | None = None,
) -> Path:
    """Write an adapter as a checkpoint that loads into a model of loralib's layers with ``strict=False``.

    The scale is not in it: make the layers with the adapter's `r` and `lora_alpha`. The names of a head's
    classes are not in it either.

    Args:
        adapter: what to write; tensors keep their dtype.
        path: file to write; its suffix chooses safetensors, or torch's pickled form (``.bin``, ``.pt``,
            ``.pth``, ``.ckpt``).
        enable_lora: name of a fused weight to write as a MergedLinear → its `enable_lora`.
        split: name of a MergedLinear to write → the sibling modules whose updates it takes.

    Returns:
        The file.

    Raises:
        FileError: the file cannot be written, or its suffix is not known.
        ConfigError: `enable_lora` or `split` is wrong.
        AdapterError: lists what loralib has no place for.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES or file.is_dir():
        raise FileError(f"{file} should be a file that ends in one of {', '.join(SUFFIXES)}")
    adapter.check_finite()
    named = to_tensors(adapter, fused_parts(enable_lora, split))
    # Two tensors in a file must not share memory.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in named.items()
    }
    replace_files(file.parent, {file.name: lambda target: save(target, tensors)})
    return file


def from_tensors(
    tensors: Mapping[str, Tensor],
    lora_alpha: float,
    fused: Mapping[str, Parts] | None = None,
    *,
    embeddings: Iterable[str] = (),
    **settings: Any,
) -> Adapter:
    """An adapter from tensors by their names in loralib's file; arguments as `read`'s.

    Raises:
        ConfigError: a setting is wrong.
        AdapterError: lists what is not a loralib adapter's.
    """
    if lora_alpha <= 0:
        raise ConfigError(f"lora_alpha must be a positive number, not {lora_alpha!r}")
    fused, embeddings = fused or {}, list(embeddings)
    halves: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if leaf in ("lora_A", "lora_B") and path:
            halves.setdefault(path, {})[leaf] = tensor
        elif "lora_" in key:
            problems.append(f"{key}: a loralib layer has lora_A and lora_B, and no other tensor of that kind")
        else:
            extras[key] = tensor
    for what, names in (("embeddings", embeddings), ("a fused weight's parts", fused)):
        problems += [
            f"{name}: named as {what}, but in no key{nearest(name, halves)}"
            for name in names
            if not any(ends_with(path, name) for path in halves)
        ]
    factors: dict[str, Factors] = {}
    for path, sides in halves.items():
        try:
            A, B = _pair(sides)
            parts = next((parts for name, parts in fused.items() if ends_with(path, name)), None)
            if parts is not None:
                made = unpacked(path, A, B, lora_alpha, parts)
            elif A.shape[0] != B.shape[1]:
                raise AdapterError(_unclear(A, B))
            else:
                table = any(ends_with(path, name) for name in embeddings)
                made = {path: Factors(A, B, lora_alpha / B.shape[1], "embedding" if table else "linear")}
        except AdapterError as error:
            problems.append(f"{path}: {error}")
            continue
        problems += [f"{taken}: two updates would land there" for taken in factors.keys() & made.keys()]
        factors |= made
    base = [f"{path}.weight" for path in halves if f"{path}.weight" in extras]
    if base:
        problems.append(
            f"it holds weights of the base beside their updates ({listing(base, limit=3)}): this is the "
            "whole model's state; save lora_state_dict(model) instead"
        )
    if not halves:
        problems.append("there is no lora_A or lora_B in it")
    if problems:
        raise AdapterError(f"this is not a loralib adapter that can be read:\n{lines(problems)}")
    return Adapter(derived_config(factors, extras, **settings), factors, extras)


def to_tensors(adapter: Adapter, fused: Mapping[str, Parts] | None = None) -> dict[str, Tensor]:
    """An adapter's tensors by their names in loralib's file.

    Raises:
        AdapterError: lists what loralib has no place for.
    """
    factors, named = dict(adapter.factors), {}
    problems = [*_refused(adapter)]
    for name, parts in (fused or {}).items():
        found = groups(factors, name, parts)
        if not found:
            problems.append(f"{name}: the adapter has nothing of which it is made{nearest(name, factors)}")
        for path, members in found.items():
            try:
                A, B = packed([factors.get(member) for member in members], members, parts)
            except AdapterError as error:
                problems.append(f"{path}: {error}")
                continue
            for member in members:
                del factors[member]
            named[f"{path}.lora_A"], named[f"{path}.lora_B"] = A, B
    for path, f in factors.items():
        named[f"{path}.lora_A"], named[f"{path}.lora_B"] = f.A, f.B
    if problems:
        raise AdapterError(f"loralib cannot hold this adapter:\n{lines(problems)}")
    return {**named, **adapter.extras}


def _refused(adapter: Adapter) -> Iterator[str]:
    """Lists what an adapter has beyond A, B and tensors by their names in the base."""
    plain = ("A", "B", "scale", "kind")
    for path, f in adapter.factors.items():
        if f.kind not in ("linear", "embedding"):
            yield f"{path}: loralib lays out a {f.kind} layer's factors otherwise"
        for item in dataclasses.fields(f):
            if item.name not in plain and getattr(f, item.name) is not None:
                what = "DoRA's magnitudes" if item.name == "magnitude" else f"its {item.name}"
                yield f"{path}: loralib has no place for {what}"
    for name in adapter.extras:
        if name.endswith(TOKEN_ROWS):
            yield f"{name}: loralib has no place for single rows of a table"
    for item in dataclasses.fields(adapter):
        # The names of the classes are for people; what the head computes is in its tensors.
        if item.name not in ("config", "factors", "extras", "classes") and getattr(adapter, item.name):
            names = listing(map(str, getattr(adapter, item.name)))
            yield f"loralib has no place for its {item.name}: {names}"


def _pair(sides: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if missing := {"lora_A", "lora_B"} - sides.keys():
        raise AdapterError(f"{missing.pop()} is missing")
    A, B = sides["lora_A"], sides["lora_B"]
    if A.dim() != 2 or B.dim() != 2 or 0 in (*A.shape, *B.shape):
        raise AdapterError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are not the two halves of an update")
    if not A.is_floating_point() or not B.is_floating_point():
        raise AdapterError(f"A ({A.dtype}) and B ({B.dtype}) should be real numbers, such as float32")
    return A, B


def _unclear(A: Tensor, B: Tensor) -> str:
    """The message for halves that share no rank."""
    rows, r = A.shape[0], B.shape[1]
    if rows % r:
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} do not share one rank"
    return (
        f"holds {rows // r} updates of rank {r} in one, as a MergedLinear does; which projections they "
        "belong to is not in the file. Give its enable_lora (the model's weight is fused too), or split (the "
        "model has a module for each)"
    )


def _file(path: Path) -> Path:
    """The one checkpoint that a path means."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileError(f"{path} is neither a file nor a folder; give a checkpoint of loralib's")
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        have = listing(file.name for file in found) or "none"
        raise FileError(f"{path} should hold one file ending in {', '.join(SUFFIXES)}, and has: {have}")
    return found[0]


def _load(path: Path) -> dict[str, Tensor]:
    data = load(path)
    if isinstance(data, dict):
        data = next((data[key] for key in _WRAPPERS if isinstance(data.get(key), dict)), data)
    return named_tensors(data, path)
