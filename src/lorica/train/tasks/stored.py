"""Encoded rows as Arrow files, mapped into memory where they are opened; and a cache of them.

Rows are known in the cache by all that their encoding depends on: their content, columns and labels, the
task, the tokenizer and the versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lorica.errors import FileError, LoricaWarning
from lorica.plain import as_json
from lorica.reading import cache_folder, read_object
from lorica.train.settings import DataConfig
from lorica.train.tasks.base import Encoded, Task

_FACTS, _LENGTHS, _FEATURES = "facts.json", "lengths.npy", "features"

_VERSIONS = ("lorica", "datasets", "tokenizers", "transformers")


def store(encoded: Encoded, folder: Path) -> None:
    """Write encoded rows into a folder; the mark that it is whole is written last."""
    encoded.features.save_to_disk(folder / _FEATURES)
    if encoded.lengths is not None:
        np.save(folder / _LENGTHS, np.asarray(encoded.lengths, dtype=np.int64))
    facts = {name: getattr(encoded, name) for name in ("truncated", "longest", "rows")}
    (folder / _FACTS).write_text(as_json(facts), encoding="utf-8")


def stored(folder: Path, *, mapped: bool = True) -> Encoded:
    """The encoded rows in a folder.

    Args:
        folder: where `store` wrote them.
        mapped: map them into memory. False reads them, and the folder may go.

    Raises:
        FileError: it is damaged.
    """
    facts: dict[str, Any] = dict(read_object(folder / _FACTS))
    try:
        lengths = np.load(folder / _LENGTHS).tolist() if (folder / _LENGTHS).is_file() else None
        features = Dataset.load_from_disk(str(folder / _FEATURES), keep_in_memory=not mapped)
        return Encoded(features, lengths=lengths, **facts)
    except (OSError, ValueError, TypeError) as error:
        raise FileError(f"{folder} is damaged: {error}; delete that folder") from error


def cached(key: str | None, encode: Callable[[], Encoded]) -> Encoded:
    """Encoded rows from the cache, or encoded and put there.

    Args:
        key: their name in the cache (``rows`` in `cache_folder`); see `key_of`. None leaves it alone.
        encode: encodes them.
    """
    if key is None:
        return encode()
    try:
        place = cache_folder() / "rows" / key
        there = (place / _FACTS).is_file()
    except OSError as error:
        return _unkept(encode(), error)
    if there:
        return stored(place)
    encoded = encode()
    try:
        _put(encoded, place)
    except OSError as error:
        return _unkept(encoded, error)
    return stored(place)


def _unkept(encoded: Encoded, error: OSError) -> Encoded:
    """Encoded rows, with a word on why they are not in the cache."""
    where = f"{error.filename}: " if error.filename else ""
    told = f"encoded rows are not kept: {where}{error.strerror or error}; LORICA_CACHE names another folder"
    warnings.warn(told, LoricaWarning, stacklevel=3)
    return encoded


def _put(encoded: Encoded, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
    try:
        store(encoded, made)
        if not place.exists():  # another process may have made the same
            made.rename(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def key_of(
    task: Task, tokenizer: Any, data: DataConfig, max_length: int, fingerprint: Mapping[str, Any]
) -> str | None:
    """The name of encoded rows in the cache; None where an encoding depends on more than can be told.

    Args:
        task: that encodes them; one of lorica's own, which reads no other files.
        tokenizer: a fast one.
        data: columns and labels, resolved.
        max_length: tokens kept of each row.
        fingerprint: of the rows; see `lorica.train.data.rows.fingerprint`.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(task)
    if core is None or task.reads_files or not kind.__module__.startswith("lorica."):
        return None
    known = {
        "versions": {name: version(name) for name in _VERSIONS},
        "task": f"{kind.__module__}.{kind.__qualname__}",
        "tokenizer": hashlib.sha256(core.to_str().encode()).hexdigest(),
        "settings": repr(sorted(tokenizer.init_kwargs.items(), key=lambda item: item[0])),
        "template": repr(tokenizer.chat_template),
        "length": [max_length, tokenizer.model_max_length],
        "data": {**dataclasses.asdict(data), "processes": None, "cache": None},  # which change no row
        "rows": dict(fingerprint),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
