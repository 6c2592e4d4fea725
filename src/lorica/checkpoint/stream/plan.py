"""The layout of a merged checkpoint, tensor by tensor, before a byte of it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.adapter import Adapter
from lorica.checkpoint.stream.placement import Placement, Update, place, trained_whole
from lorica.checkpoint.stream.shards import (
    CODES,
    DTYPES,
    Checkpoint,
    Entry,
    Shard,
    make_header,
    same_bytes,
    short,
)
from lorica.errors import AdapterError, ConfigError

CONFIG = "config.json"
# Weights in other forms are not the merged ones, and some readers would take them first; an adapter in the
# base's folder would be applied on top.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|tflite|ot|npz)(\.index\.json)?$"
    r"|^adapter_config\.json$"
)
# Files that training writes beside an adapter and that belong to the merged model: tokenizer and recipe.
_OF_ADAPTER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "recipe.yaml",
)  # fmt: skip
# Dtypes that a module trained whole may have beside weights: counters and masks among its buffers.
_OTHER = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SUFFIXES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


@dataclass(frozen=True)
class Piece:
    """A tensor of the merged checkpoint.

    Args:
        name: its name in that checkpoint.
        dtype: dtype in which it is stored.
        shape: of the tensor.
        source: of its values: a tensor of the base's file, or of the adapter.
        base_dtype: dtype to which a tensor of the adapter is rounded first, as a model would hold it.
        updates: updates of its rows, in their order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Entry | Tensor
    base_dtype: torch.dtype | None = None
    updates: tuple[Update, ...] = ()

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of the base."""
        return isinstance(self.source, Entry) and not self.updates and self.dtype == self.source.dtype

    @property
    def nbytes(self) -> int:
        """Bytes when stored."""
        if isinstance(self.source, Entry) and self.dtype == self.source.dtype:
            return self.source.nbytes
        numel = self.source.numel if isinstance(self.source, Entry) else self.source.numel()
        return numel * (DTYPES.get(self.dtype) or self.source.dtype).itemsize  # type: ignore[union-attr]


@dataclass(frozen=True)
class ShardPlan:
    """A file of the merged checkpoint.

    Args:
        name: of the file.
        base: the base's file of that name.
        header: its first bytes.
        pieces: its tensors, in the order of their bytes.
    """

    name: str
    base: Shard
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def copied(self) -> bool:
        """Whether the file is the base's, byte for byte."""
        return self.header == self.base.header and all(piece.copied for piece in self.pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """A merged checkpoint.

    Args:
        base: the checkpoint that the adapter is merged into.
        shards: its files of weights.
        texts: other files whose content changes: name → content.
        files: other files that are copied: name → its present path.
        left_out: files of the base that are not copied.
        untied: names of an output and an input embedding that are no longer tied.
    """

    base: Checkpoint
    shards: tuple[ShardPlan, ...]
    texts: Mapping[str, str]
    files: Mapping[str, Path]
    left_out: tuple[str, ...]
    untied: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def indices(self) -> list[str]:
        """Names of the files that list the shards."""
        return [self.base.index[0]] if self.base.index else []

    @property
    def updated(self) -> list[tuple[ShardPlan, Piece]]:
        """The tensors that the adapter updates, with their files."""
        return [(shard, piece) for shard in self.shards for piece in shard.pieces if piece.updates]


def make_plan(
    adapter: Adapter,
    base: Checkpoint,
    folder: Path | None,
    dtype: torch.dtype | None,
    config: Mapping[str, Any],
) -> Plan:
    """Plan the merged checkpoint.

    Args:
        adapter: the adapter to merge.
        base: the checkpoint to merge it into.
        folder: the adapter's; a tokenizer in it replaces the base's.
        dtype: dtype in which floating-point tensors are stored; None keeps each tensor's own.
        config: entries of `config.json` to set.

    Raises:
        AdapterError: lists the tensors that have no place in the base.
        ConfigError: the dtype is not one that weights are stored in.
    """
    if dtype is not None and dtype not in CODES:
        raise ConfigError(f"dtype must be one of {', '.join(map(str, CODES))}, not {dtype}")
    try:
        placement = place(adapter, base)
    except AdapterError as error:
        hint = (
            "Where a base's files and its model name modules otherwise, merge in memory: lorica merge "
            "without --stream"
        )
        raise AdapterError(f"{error}\n{hint}" if "unexpected: " in str(error) else str(error)) from None
    tie = placement.untied
    if tie and tie.stored and tie.table and not same_bytes(base, tie.head, tie.table):
        raise AdapterError(
            f"{base.folder}: config.json says that {tie.head} is tied to {tie.table}, and the file holds "
            "two that differ; set tie_word_embeddings to what is right and merge again"
        )
    shards = _shards(placement, base, dtype)
    changed = {**_config(adapter, placement, base, dtype), **config}
    texts = (
        {} if changed == base.config else {CONFIG: json.dumps(changed, indent=2, ensure_ascii=False) + "\n"}
    )
    if base.index:
        name, content = base.index
        texts[name] = _text(_index(content, shards, base))
    files, left_out = _files(base, folder, texts)
    return Plan(base, shards, texts, files, left_out, (tie.head, tie.table) if tie and tie.table else ())


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _shards(placement: Placement, base: Checkpoint, dtype: torch.dtype | None) -> tuple[ShardPlan, ...]:
    stored, tie = CODES[dtype] if dtype is not None else None, placement.untied
    # New tensors at the top of a model make the others' place below it a matter of names.
    new_names = bool(placement.added) or (tie is not None and not tie.stored)
    prefix = placement.names.prefix if new_names else ""
    pieces: dict[str, list[Piece]] = {}
    for file, shard in base.shards.items():
        pieces[file] = []
        for entry in shard.entries.values():
            kept = stored if stored and entry.dtype in DTYPES else entry.dtype
            new = placement.replaced.get(entry.name)
            updates = tuple(placement.updates.get(entry.name, ()))
            source = entry if new is None else new
            precision = DTYPES.get(kept) if new is not None else None
            shape = tuple(source.shape)
            pieces[file].append(Piece(prefix + entry.name, kept, shape, source, precision, updates))
    last = next(reversed(pieces))
    common = stored or _common_dtype(base)
    head = (placement.head,) if placement.head else ()
    for name, tensor in placement.added.items():
        code = common if tensor.is_floating_point() else _OTHER[tensor.dtype]
        updates = head if tie and name == tie.head else ()
        pieces[last].append(Piece(name, code, tuple(tensor.shape), tensor, DTYPES.get(code), updates))
    if tie and tie.table and not tie.stored and tie.head not in placement.added:
        file, entry = base.home[tie.table], base.entry(tie.table)
        kept = stored if stored and entry.dtype in DTYPES else entry.dtype
        pieces[file].append(Piece(tie.head, kept, entry.shape, entry, None, head))
    return tuple(_shard(file, base.shards[file], found) for file, found in pieces.items())


def _shard(file: str, shard: Shard, pieces: list[Piece]) -> ShardPlan:
    before = [(e.name, e.dtype, e.shape) for e in shard.entries.values()]
    if [(p.name, p.dtype, p.shape) for p in pieces] == before:
        return ShardPlan(file, shard, shard.header, tuple(pieces))
    # Wide elements first: then all are aligned, whatever was added.
    pieces = sorted(pieces, key=lambda p: -(DTYPES[p.dtype].itemsize if p.dtype in DTYPES else 1))
    header = make_header(((p.name, p.dtype, p.shape, p.nbytes) for p in pieces), shard.metadata)
    return ShardPlan(file, shard, header, tuple(pieces))


def _common_dtype(base: Checkpoint) -> str:
    """The dtype that holds most of the base's bytes."""
    sizes: dict[str, int] = {}
    for shard in base.shards.values():
        for entry in shard.entries.values():
            if entry.dtype in DTYPES:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda code: sizes[code], default="F32")


def _config(
    adapter: Adapter, placement: Placement, base: Checkpoint, dtype: torch.dtype | None
) -> dict[str, Any]:
    config = json.loads(json.dumps(base.config))
    parts = [config, *(part for part in config.values() if isinstance(part, dict) and "model_type" in part)]
    if placement.untied:
        config["tie_word_embeddings"] = False
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if dtype is not None:
        for part in parts:
            for key in {"dtype", "torch_dtype"} & part.keys():
                part[key] = short(dtype)
    task = adapter.config.task_type
    heads = [
        tensor
        for name, tensor in adapter.extras.items()
        if trained_whole(adapter, name) and name.endswith(".weight") and tensor.dim() == 2
    ]
    if config and task in _SUFFIXES and heads:
        config["architectures"] = [
            re.sub(r"(Model|LMHeadModel|LMHead|For[A-Z]\w*)?$", "", name, count=1) + _SUFFIXES[task]
            for name in config.get("architectures") or []
        ]
        # The last matrix of a head is the one with the fewest rows.
        classes = min(head.shape[0] for head in heads)
        named = adapter.classes if adapter.classes and len(adapter.classes) == classes else None
        if task != "QUESTION_ANS" and (named or len(config.get("id2label") or "..") != classes):
            names = named or [f"LABEL_{i}" for i in range(classes)]
            config["id2label"] = {str(i): name for i, name in enumerate(names)}
            config["label2id"] = {name: i for i, name in enumerate(names)}
            config.pop("num_labels", None)
    return config


def _index(content: Mapping[str, Any], shards: Iterable[ShardPlan], base: Checkpoint) -> dict[str, Any]:
    known = {(file, name) for name, file in base.home.items()}
    listed = {
        piece.name: (shard.name, piece.nbytes)
        for shard in shards
        for piece in shard.pieces
        if not isinstance(piece.source, Entry) or (shard.name, piece.source.name) in known
    }
    metadata = dict(content.get("metadata") or {})
    metadata["total_size"] = sum(nbytes for _, nbytes in listed.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(
            torch.Size(piece.shape).numel()
            for shard in shards
            for piece in shard.pieces
            if piece.name in listed
        )
    return {**content, "metadata": metadata, "weight_map": {name: listed[name][0] for name in sorted(listed)}}


def _files(
    base: Checkpoint, folder: Path | None, texts: Mapping[str, str]
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Files to copy, and files to leave out."""
    files: dict[str, Path] = {}
    left_out = []
    for path in sorted(base.folder.rglob("*")):
        name = path.relative_to(base.folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or str(name) in base.shards:
            continue
        if _WEIGHTS.search(path.name) and str(name) not in texts:
            left_out.append(str(name))
        elif str(name) not in texts:
            files[str(name)] = path
    if folder is not None:
        own = [name for name in _OF_ADAPTER if (folder / name).is_file()]
        # A tokenizer is taken whole, or not at all.
        if "tokenizer_config.json" in own:
            files = {name: path for name, path in files.items() if name not in _OF_ADAPTER}
        else:
            own = [name for name in own if name == "recipe.yaml"]
        files |= {name: folder / name for name in own}
    return files, tuple(left_out)
