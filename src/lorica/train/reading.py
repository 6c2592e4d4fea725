"""Rows from wherever they are: a file, a folder of files or images, the Hub, or the embedded data set."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from lorica.errors import ConfigError, FileError, listing
from lorica.train import embedded
from lorica.train.images import holds_images, image_rows
from lorica.train.quiet import quiet

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "testing"),
}
IN_PYTHON = "(rows given in Python)"
"""What a recipe says of rows that were handed over as a `datasets.Dataset`."""

_KNOWN = {name for names in SPLITS.values() for name in names}


def read(source: str, subset: str | None = None) -> dict[str, Dataset]:
    """Read a file, a folder or a Hub data set.

    Args:
        source: path or name; see `DataConfig.train`. With ``#`` and a split's name after it, that split.
        subset: configuration of a Hub data set that has several.

    Returns:
        Rows by split; a single file is the ``train`` split.

    Raises:
        FileError: it is missing or unreadable, or the Hub does not have it or cannot be reached.
    """
    source, split = _parts(source)
    path = Path(source).expanduser()
    with quiet():
        found = _read(source, path, subset, split)
    if split is None:
        return found
    if split not in found:
        raise FileError(f"{source} has no {split} split; it has: {listing(found)}")
    return {split: found[split]}


def _read(source: str, path: Path, subset: str | None, split: str | None) -> dict[str, Dataset]:
    if path.is_file():
        return {"train": _file(path)}
    if path.is_dir():
        return _folder(path, split)
    if source == IN_PYTHON:
        raise FileError(
            "the rows of this recipe were given in Python; give them again: train(recipe, rows), "
            "evaluate(folder, rows)"
        )
    if source == embedded.DATA:
        return embedded.docstrings()
    if format_of(path) or source.startswith((".", "/", "~")):
        raise FileError(f"no file or folder {source}{_neighbours(path)}")
    return _hub(source, subset)


def describe(source: str, split: str) -> str:
    """What to call a split of a source in a message: the file it is in, if it is in one."""
    source, _ = _parts(source)
    path = Path(source).expanduser()
    if path.is_file():
        return source
    if source == IN_PYTHON:
        return f"the {split} rows"
    if path.is_dir() and split in (files := _files(path)):
        return str(files[split])
    return f"the {split} split of {source}"


def format_of(path: Path) -> str | None:
    """Format of a file of rows by its name, or None."""
    return FORMATS.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _file(path: Path) -> Dataset:
    kind = format_of(path)
    if kind is None:
        raise FileError(
            f"cannot tell the format of {path} by its name; expected one of {', '.join(FORMATS)} (or any "
            "of them .gz)"
        )
    options: dict[str, Any] = {}
    if kind == "csv":
        # The word "NA" or "null" is text like any other.
        options = {"sep": "\t" if ".tsv" in path.suffixes else ",", "keep_default_na": False}
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:  # each reader raises its own kinds, wrapped in datasets' own
        if "corresponds to no data" in str(error):
            raise FileError(f"{path} has no rows") from error
        raise FileError(f"cannot read {path} as {kind}: {_reason(error)}") from error
    assert isinstance(rows, Dataset)
    return rows


def _files(folder: Path) -> dict[str, Path]:
    """Files of rows in a folder by the part of their names before the first dot."""
    return {
        file.name.split(".")[0]: file
        for file in sorted(folder.iterdir())
        if file.is_file() and format_of(file)
    }


def _parts(source: str) -> tuple[str, str | None]:
    """A source and the split that is named after its ``#``, if one is; a file may have one in its name."""
    name, mark, split = source.rpartition("#")
    return (name, split) if mark and not Path(source).expanduser().exists() else (source, None)


def _folder(path: Path, wanted: str | None) -> dict[str, Dataset]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        stored = datasets.load_from_disk(str(path))
        return (
            {str(name): rows for name, rows in stored.items()}
            if isinstance(stored, DatasetDict)
            else {"train": stored}
        )
    files = {name: file for name, file in _files(path).items() if name != "metadata"}
    if not files and holds_images(path):
        return _images(path)
    named = {name: file for name, file in files.items() if name in _KNOWN or name == wanted}
    if not named and len(files) == 1:
        named = {"train": next(iter(files.values()))}
    if not named:
        there = ", ".join(file.name for file in files.values()) or "no file of rows"
        raise FileError(
            f"the folder {path} must hold train.csv, .tsv, .json, .jsonl, .parquet or .arrow (or .gz), or "
            f"images; it has {there}"
        )
    return {name: _file(file) for name, file in named.items()}


def _images(path: Path) -> dict[str, Dataset]:
    parts = {each.name: each for each in sorted(path.iterdir()) if each.is_dir() and each.name in _KNOWN}
    return {name: image_rows(part, _file) for name, part in (parts or {"train": path}).items()}


def _hub(name: str, subset: str | None) -> dict[str, Dataset]:
    try:
        found = datasets.load_dataset(name, subset)
    except ValueError as error:
        raise FileError(f"cannot load {name} from the Hub: {_reason(error)}") from error
    except Exception as error:  # the Hub's client has a class for each way in which a network can fail
        raise FileError(
            f"{name} is no file or folder here, and could not be had from the Hugging Face Hub "
            f"({_reason(error)}). A csv, tsv, json, jsonl, parquet or arrow file works without the Hub, as "
            "does a folder of such files, of images, or one that save_to_disk wrote: --data.train PATH"
        ) from error
    if not isinstance(found, DatasetDict):
        raise ConfigError(f"{name} is streamed, which is not supported; download it and name the files")
    return {str(split): rows for split, rows in found.items()}


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no detail'}"


def _neighbours(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; there is no folder {path.parent} either"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(str(path.parent / name) for name in close)}?" if close else ""
