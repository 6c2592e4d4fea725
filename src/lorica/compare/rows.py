"""What a run rests on: fingerprints of rows and models on disk, and small draws of training rows."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from lorica.errors import ConfigError
from lorica.train import data as sources
from lorica.train import tasks
from lorica.train.quiet import quiet
from lorica.train.recipe import DataConfig


def fingerprint(source: str) -> str:
    """What a path holds, by its content; a name that is no path stands for itself.

    Moved rows are the same rows; rewritten ones are not.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return source
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    names = [file.name if path.is_file() else str(file.relative_to(path)) for file in files]
    # A renamed file is the same, but what decides how it is read is the end of its name.
    names = ["".join(path.suffixes)] if path.is_file() else names
    return _digest(stamps, tuple(names))


@functools.cache
def _digest(stamps: tuple[tuple[str, int, int], ...], names: tuple[str, ...]) -> str:
    whole = hashlib.sha256()
    for (file, _, _), name in zip(stamps, names, strict=True):
        with open(file, "rb") as content:  # noqa: PTH123
            whole.update(f"{name}:{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def draw(task: str, data: DataConfig, rows: int, folder: Path) -> DataConfig:
    """Write a data set with fewer training rows, and say where it is.

    The rows are drawn by `data.split_seed`, so that a smaller draw is part of a larger one. Validation and
    test rows stay whole.

    Args:
        task: name of the task.
        data: the data set.
        rows: training rows to draw.
        folder: for what is drawn, a folder each.

    Raises:
        ConfigError: there are fewer.
    """
    splits = sources.load(data)
    data = tasks.get(task).resolve(splits, data)
    if rows > len(splits.train):
        raise ConfigError(f"{data.train} has {len(splits.train):,} training rows, fewer than {rows:,}")
    held = [fingerprint(source) for source in (data.train, data.validation, data.test) if source]
    content = [*held, data.subset, data.validation_fraction, data.split_seed, rows]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    place = folder / name
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
        try:
            drawn = splits.train.shuffle(seed=data.split_seed).select(range(rows))
            with quiet():
                for split, part in replace(splits, train=drawn).items():
                    part.to_parquet(str(stage / f"{split}.parquet"))
            stage.replace(place)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return replace(data, train=str(place), validation=None, test=None, subset=None, validation_fraction=0.0)
