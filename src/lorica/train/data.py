"""Rows from wherever the user has them: a file, a folder, a name on the Hub, or the embedded data set."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from lorica.errors import ConfigError, FileError
from lorica.train import embedded
from lorica.train.quiet import quiet
from lorica.train.recipe import DataConfig

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "testing"),
}
_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


@dataclass(frozen=True)
class Splits:
    """The rows of a run, as they came.

    Args:
        train: rows to learn from.
        validation: rows that choose the best checkpoint, or None.
        test: rows for the final score, or None.
    """

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None

    def items(self) -> Iterator[tuple[str, Dataset]]:
        """Name and rows of each split there is."""
        for name in SPLITS:
            if (rows := getattr(self, name)) is not None:
                yield name, rows


def load(data: DataConfig) -> Splits:
    """Read the rows that a configuration names.

    Args:
        data: where they are. Where it names no validation or test rows, the split of that name beside the
            training rows is taken; failing that, validation rows are drawn from the training rows.

    Returns:
        The splits, none of them empty.

    Raises:
        FileError: something is missing, empty or unreadable.
    """
    source = read(data.train, data.subset)
    train = _split(source, "train", data.train)
    validation = _chosen(source, "validation", data.validation, data.subset)
    test = _chosen(source, "test", data.test, data.subset)
    if validation is None and data.validation_fraction:
        if len(train) < 2:
            raise FileError(
                f"{data.train} has {len(train)} row, too few to set some aside; give --data.validation"
            )
        parts = train.train_test_split(test_size=data.validation_fraction, seed=data.split_seed)
        train, validation = parts["train"], parts["test"]
    return Splits(train, validation, test)


def load_test(source: str, subset: str | None = None) -> Dataset:
    """Read the rows to evaluate on: the test split of `source` if it has splits, else all of it."""
    found = read(source, subset)
    return _split(found, "test" if set(SPLITS["test"]) & set(found) else "train", source)


def read(source: str, subset: str | None = None) -> dict[str, Dataset]:
    """Read a file, a folder or a Hub data set.

    Args:
        source: path or name; see `DataConfig.train`.
        subset: configuration of a Hub data set that has several.

    Returns:
        Rows by split; a single file is the ``train`` split.

    Raises:
        FileError: it is missing or unreadable, or the Hub does not have it or cannot be reached.
    """
    path = Path(source).expanduser()
    with quiet():
        if path.is_file():
            return {"train": _file(path)}
        if path.is_dir():
            return _folder(path)
        if source == embedded.DATA:
            return embedded.docstrings()
        if _format(path) or source.startswith((".", "/", "~")):
            raise FileError(f"no file or folder {source}{_neighbours(path)}")
        return _hub(source, subset)


def _chosen(source: dict[str, Dataset], split: str, named: str | None, subset: str | None) -> Dataset | None:
    if named is not None:
        found = read(named, subset)
        return _split(found, split if set(SPLITS[split]) & set(found) else "train", named)
    return _split(source, split, "") if set(SPLITS[split]) & set(source) else None


def _split(source: dict[str, Dataset], split: str, where: str) -> Dataset:
    rows = next((source[name] for name in SPLITS[split] if name in source), None)
    if rows is None:
        raise FileError(f"{where} has no {split} split; it has: {', '.join(source)}")
    if not len(rows):
        raise FileError(f"{where or 'the data'} has no rows in its {split} split")
    return rows


def _format(path: Path) -> str | None:
    return _FORMATS.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _file(path: Path) -> Dataset:
    kind = _format(path)
    if kind is None:
        raise FileError(
            f"cannot tell the format of {path} by its name; expected one of {', '.join(_FORMATS)} (or any "
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


def _folder(path: Path) -> dict[str, Dataset]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        stored = datasets.load_from_disk(str(path))
        return (
            {str(name): rows for name, rows in stored.items()}
            if isinstance(stored, DatasetDict)
            else {"train": stored}
        )
    files = {
        file.name.split(".")[0]: file for file in sorted(path.iterdir()) if file.is_file() and _format(file)
    }
    named = {split: files[name] for split, names in SPLITS.items() for name in names if name in files}
    if not named and len(files) == 1:
        named = {"train": next(iter(files.values()))}
    if not named:
        there = ", ".join(file.name for file in files.values()) or "no file of rows"
        raise FileError(
            f"the folder {path} must hold train.csv, .tsv, .json, .jsonl or .parquet (or .gz); it has {there}"
        )
    return {split: _file(file) for split, file in named.items()}


def _hub(name: str, subset: str | None) -> dict[str, Dataset]:
    try:
        found = datasets.load_dataset(name, subset)
    except ValueError as error:
        raise FileError(f"cannot load {name} from the Hub: {_reason(error)}") from error
    except Exception as error:  # the Hub's client has a class for each way in which a network can fail
        raise FileError(
            f"{name} is no file or folder here, and could not be had from the Hugging Face Hub "
            f"({_reason(error)}). A csv, json, jsonl or parquet file works without the Hub."
        ) from error
    if not isinstance(found, DatasetDict):
        raise ConfigError(f"{name} is streamed, which is not supported; download it and name the files")
    return {str(split): rows for split, rows in found.items()}


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no detail'}"
    )


def _neighbours(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; there is no folder {path.parent} either"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(str(path.parent / name) for name in close)}?" if close else ""
