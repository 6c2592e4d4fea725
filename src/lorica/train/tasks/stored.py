"""Encoded rows as Arrow files, mapped into memory where they are opened; and a cache of them.

The cache is the folder ``LORICA_CACHE``, or ``lorica`` in the user's cache folder. Rows are known by all that
their encoding depends on: their content, columns and labels, the task, the tokenizer and the versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lorica.errors import FileError
from lorica.plain import as_json
from lorica.reading import read_object
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
        key: their name in the cache; see `key_of`. None leaves the cache alone.
        encode: encodes them.
    """
    if key is None:
        return encode()
    place = cache_folder() / key
    if not (place / _FACTS).is_file():
        encoded = encode()
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
        try:
            store(encoded, made)
            if not place.exists():  # another process may have made the same
                made.rename(place)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return stored(place)


def cache_folder() -> Path:
    """The folder of encoded rows."""
    if given := os.environ.get("LORICA_CACHE"):
        return Path(given) / "rows"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorica" / "rows"


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
