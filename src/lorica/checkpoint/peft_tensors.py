"""An adapter's tensors by the names that PEFT gives them, both ways.

base_model.model.<module path>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector ...

A module of the model may be called as a part of PEFT's own is (``base_layer``). Its key is PEFT's all the
same; beside the tensors stands how it is read (`Spelled.marks`): with a mark in the name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.adapter import TOKEN_ROWS, Adapter, Factors, Kind, host_of
from lorica.checkpoint.parameters import of_parameter
from lorica.config import AdapterConfig, LoraConfig
from lorica.errors import AdapterError, lines

_PREFIX = "base_model.model."

_ADDED = "added."

_SIDE = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<leaf>\.weight)?$")

_BIAS = ".lora_B.bias"

_MAGNITUDE = "lora_magnitude_vector"

_UNSUPPORTED = {
    "lora_diag": "KaSA",
    "lora_velora_embed": "VeLoRA",
    "lora_monteclora_sampler": "MonteCLoRA",
}

_UNSUPPORTED_PART = re.compile("|".join(_UNSUPPORTED))

_MARK = "\x1f"

_TAKEN = re.compile(
    r"(?:(?<=\.)|^)(?:base_layer|modules_to_save|original_module|token_adapter|_orig_mod"
    rf"|lora_(?:embedding_)?[AB]|{_MAGNITUDE})(?=\.|$)|{_UNSUPPORTED_PART.pattern}"
)
"""A name that means a part of PEFT's own."""


class Spelled(NamedTuple):
    """An adapter as PEFT's file holds it.

    Args:
        tensors: by their keys.
        marks: key → how it is read, of those that would be read as something else.
    """

    tensors: dict[str, Tensor]
    marks: dict[str, str]


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors by their names in PEFT's file; see `spelled`."""
    return spelled(adapter).tensors


def spelled(adapter: Adapter) -> Spelled:
    """An adapter's tensors by their names in PEFT's file, and how these are read."""
    named = _named(adapter)
    keys = {name: name.replace(_MARK, "") for name in named}
    tensors = {keys[name]: tensor for name, tensor in named.items()}
    return Spelled(tensors, {key: name for name, key in keys.items() if key != name})


def _named(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors by their names in PEFT's file, with marks."""
    named: dict[str, Tensor] = {}
    hosts = {path: _marked_host(path, factors.kind) for path, factors in adapter.factors.items()}
    wrapped = Counter(host for host, _ in hosts.values())
    for path, factors in adapter.factors.items():
        host, inside = hosts[path]
        owner = _PREFIX + _wrap(host, wrapped, whole=False) + inside
        leaf = "" if factors.kind == "embedding" else ".weight"
        side = "lora_embedding_" if factors.kind == "embedding" else "lora_"
        named[f"{owner}.{side}A{leaf}"], named[f"{owner}.{side}B{leaf}"] = factors.A, factors.B
        if factors.bias is not None:
            named[f"{owner}{_BIAS}"] = factors.bias
        if factors.magnitude is not None:
            spatial = (1,) * (factors.A.dim() - 2)
            shape = (1, -1, *spatial) if spatial else (-1,)
            named[f"{owner}.{_MAGNITUDE}"] = factors.magnitude.reshape(shape)
    for name, tensor in adapter.extras.items():
        path, _, leaf = _marked(name).rpartition(".")
        named[f"{_PREFIX}{_wrap(path, wrapped, whole=True)}.{leaf}" if path else _PREFIX + leaf] = tensor
    named.update({_ADDED + name: tensor for name, tensor in adapter.added.items()})
    return named


@dataclass
class _Sorted:
    """A file's tensors sorted by kind, and the problems with the others."""

    halves: dict[tuple[str, Kind], dict[str, Tensor]] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    on_B: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, place: dict[str, Tensor], name: str, key: str, tensor: Tensor) -> None:
        """Add a tensor; two keys may mean the same only if their values are equal."""
        before = place.setdefault(name, tensor)
        alike = before.shape == tensor.shape and before.dtype == tensor.dtype
        if before is not tensor and not (alike and torch.equal(before, tensor)):
            self.problems.append(f"{key}: another key means the same ({name}), with other values")


def from_tensors(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    scales: Mapping[str, float] | None = None,
    marks: Mapping[str, str] | None = None,
) -> Adapter:
    """An adapter from tensors by their names in PEFT's file.

    Args:
        tensors: by those names.
        config: the configuration beside them.
        scales: of the parameters' updates, by their paths, if the file holds them.
        marks: key → how it is read, if the file says so; see `Spelled`.

    Raises:
        AdapterError: lists the keys that are not an adapter's, halves without their other half,
            and wrong ranks.
    """
    lora, others = config.members()
    found = _sort(tensors, marks or {}, takes_added=bool(others))
    problems = found.problems
    if lora is not None and (lora.rank_pattern or lora.alpha_pattern):
        paths = {path for path, _ in found.halves}
        named = lora.with_outputs(path for path in paths if f"{path}.out_proj" in paths)
        if named is not lora:
            config = (
                named
                if config is lora
                else config.replace(configs=tuple(named if part is lora else part for part in config.parts()))
            )
            lora = named
    factors = _paired(found, lora, scales)
    if lora is None or lora.trainable_token_indices is None:
        rows = (name for name in found.extras if name.endswith(f".{TOKEN_ROWS}"))
        problems += [f"{name}: trained rows, though trainable_token_indices is not set" for name in rows]
    problems += [f"{path}: {_MAGNITUDE} without lora_A and lora_B" for path in found.magnitudes]
    problems += [f"{path}: lora_B.bias without lora_A and lora_B" for path in found.on_B]
    if lora is not None and not found.halves:
        problems.append("there is no lora_A or lora_B in it")
    if problems:
        raise AdapterError(f"the weights are not those of an adapter that lorica can use:\n{lines(problems)}")
    return Adapter(config, factors, found.extras, found.added)


def _sort(tensors: Mapping[str, Tensor], marks: Mapping[str, str], *, takes_added: bool) -> _Sorted:
    found = _Sorted()
    for given, tensor in tensors.items():
        key = marks.get(given, given)
        unsupported = _UNSUPPORTED_PART.search(key)
        if _is_original(key, tensors):
            pass  # with bias="all" PEFT writes those of the frozen original too, and the trained ones twice
        elif unsupported is not None:
            feature = _UNSUPPORTED[unsupported[0]]
            found.problems.append(f"{key}: belongs to {feature}, which lorica does not support here")
        elif key.startswith(_ADDED) and takes_added:
            found.put(found.added, key.removeprefix(_ADDED), key, tensor)
        elif not key.startswith(_PREFIX):
            found.problems.append(f"{key}: does not start with {_PREFIX!r}")
        elif key.endswith(f".{_MAGNITUDE}"):
            found.put(found.magnitudes, _path(key.removesuffix(f".{_MAGNITUDE}")), key, tensor.flatten())
        elif key.endswith(_BIAS):
            found.put(found.on_B, _path(key.removesuffix(_BIAS)), key, tensor)
        elif (hit := _SIDE.match(key)) is None:
            found.put(found.extras, _path(key.replace(".modules_to_save.", ".")), key, tensor)
        elif bool(hit["embedding"]) == bool(hit["leaf"]):
            expected = "no " if hit["embedding"] else ""
            found.problems.append(f"{key}: expected {expected}'.weight' at its end")
        else:
            kind: Kind = "embedding" if hit["embedding"] else "conv" if tensor.dim() > 2 else "linear"
            found.put(found.halves.setdefault((_path(hit["path"]), kind), {}), hit["side"], key, tensor)
    return found


def _paired(
    found: _Sorted, lora: LoraConfig | None, scales: Mapping[str, float] | None = None
) -> dict[str, Factors]:
    """Path → factors, for the halves that fit; the tensors used are removed from `found`."""
    factors: dict[str, Factors] = {}
    problems = found.problems
    halves_A = {path: sides["A"] for (path, _), sides in found.halves.items() if "A" in sides}
    for (path, kind), sides in found.halves.items():
        if path in factors:
            problems.append(f"{path}: has updates of two kinds, {factors[path].kind} and {kind}")
        elif missing := {"A", "B"} - sides.keys():
            problems.append(f"{path}: lora_{missing.pop()} is missing")
        elif lora is None:
            problems.append(f"{path}: has a low-rank update, which the configuration says nothing of")
        elif not (sides["A"].is_floating_point() and sides["B"].is_floating_point()):
            problems.append(
                f"{path}: A ({sides['A'].dtype}) and B ({sides['B'].dtype}) should be real numbers, such as "
                "float32"
            )
        elif lora.target_parameters and (stacked := of_parameter(path, sides, halves_A, lora, scales or {})):
            if isinstance(stacked, str):
                problems.append(f"{path}: {stacked}")
            else:
                factors[path] = stacked
        elif problem := _mismatch(sides["A"], sides["B"], lora.rank(path), kind):
            problems.append(f"{path}: {problem}")
        else:
            magnitude, bias = found.magnitudes.pop(path, None), found.on_B.pop(path, None)
            factors[path] = Factors(sides["A"], sides["B"], lora.scale(path), kind, magnitude, bias)
            problems += _disagreements(path, _MAGNITUDE, magnitude, "use_dora", lora.use_dora)
            problems += _disagreements(path, "lora_B.bias", bias, "lora_bias", lora.lora_bias)
            vectors = {_MAGNITUDE: magnitude, "lora_B.bias": bias}
            problems += [
                f"{path}: {part} {tuple(v.shape)} ({v.dtype}) should be a real vector ({len(sides['B'])},)"
                for part, v in vectors.items()
                if v is not None and (v.shape != sides["B"].shape[:1] or not v.is_floating_point())
            ]
    return factors


def _disagreements(path: str, part: str, tensor: Tensor | None, field: str, wanted: bool) -> list[str]:
    """The problem if a module has a part that the configuration does not ask for, or lacks one."""
    if wanted and tensor is None:
        return [f"{path}: {part} is missing, though {field} is set"]
    if tensor is not None and not wanted:
        return [f"{path}: has a {part}, though {field} is not set"]
    return []


def _is_original(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a key is of what PEFT keeps beside a module trained whole, and not of a module of that name."""
    part = ".original_module."
    return part in key and any(key.replace(part, other) in tensors for other in (".", ".modules_to_save."))


def _marked(path: str) -> str:
    return _TAKEN.sub(lambda found: f"{found[0][0]}{_MARK}{found[0][1:]}", path)


def _marked_host(path: str, kind: Kind) -> tuple[str, str]:
    """As `host_of`, with marks; the path of anything but a parameter is a module's own."""
    host, inside = host_of(path) if kind == "parameter" else (path, "")
    return _marked(host), inside


def _path(key: str) -> str:
    """A module's path in the base, from PEFT's key for it."""
    # PEFT writes what torch.compile put into the names.
    host, inside = host_of(key.removeprefix(_PREFIX).replace("_orig_mod.", ""))
    host = host.replace(".token_adapter.base_layer.", ".")  # a whole table beside its trained rows
    return (re.sub(r"(\.base_layer)+\.", ".", host) + inside).replace(_MARK, "")


def _mismatch(A: Tensor, B: Tensor, r: int, kind: Kind) -> str | None:
    if (A.dim() != 2 if kind == "embedding" else A.dim() < 2) or B.dim() != A.dim():
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} are not the two halves of an update"
    if A.shape[0] != r:
        return f"its rank is {A.shape[0]}, but the configuration says r={r}"
    inner = B.shape[1]
    if inner != r and not (kind == "conv" and inner and r % inner == 0):
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} do not share one rank"
    if B.shape[2:].numel() != 1 or B.shape[0] % (r // inner):
        return (
            f"B {tuple(B.shape)} is not that of a convolution with a kernel of one, beside A {tuple(A.shape)}"
        )
    return None


def _wrap(path: str, wrapped: Mapping[str, int], *, whole: bool) -> str:
    """Insert the `base_layer` that PEFT's wrappers put between an adapted module and its parts."""
    parts = path.split(".")
    result = []
    for i, part in enumerate(parts):
        result.append(part)
        if whole or i + 1 < len(parts):
            result += ["base_layer"] * wrapped.get(".".join(parts[: i + 1]), 0)
    return ".".join(result)
