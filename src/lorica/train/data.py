"""The rows of a run: which are learned from, which choose the best checkpoint, which give the score."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from datasets import Dataset, DatasetDict

from lorica.errors import ConfigError, FileError, listing
from lorica.train import presets
from lorica.train.reading import IN_PYTHON, SPLITS, describe
from lorica.train.reading import read as read
from lorica.train.recipe import DataConfig
from lorica.train.rows import Origin, Used, use

Rows = Dataset | DatasetDict | Mapping[str, Dataset]
"""Rows that are in memory: of one split, or of several by their names."""


@dataclass(frozen=True)
class Splits:
    """The rows of a run, as they came.

    Args:
        train: rows to learn from.
        validation: rows that choose the best checkpoint, or None.
        test: rows for the final score, or None.
        origins: where each split's rows came from.
        skipped: split → how many more there were that could not be used, and what was wrong with the first.
    """

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)
    skipped: Mapping[str, tuple[int, str | None]] = field(default_factory=dict)

    def items(self) -> Iterator[tuple[str, Dataset]]:
        """Name and rows of each split there is."""
        for name in SPLITS:
            if (rows := getattr(self, name)) is not None:
                yield name, rows

    def used(self) -> dict[str, Used]:
        """Rows of each split there is, and where they came from."""
        return {
            name: Used(
                rows, self.origins.get(name) or Origin(f"the {name} rows"), *self.skipped.get(name, (0, None))
            )
            for name, rows in self.items()
        }


def load(data: DataConfig, rows: Rows | None = None) -> Splits:
    """Read the rows that a configuration names.

    Args:
        data: where they are. Where it names no validation or test rows, the split of that name beside the
            training rows is taken; failing that, validation rows are drawn from the training rows.
        rows: rows in memory, to take in place of those that `data.train` names.

    Returns:
        The splits, none of them empty.

    Raises:
        FileError: something is missing, empty or unreadable.
    """
    source = read(data.train, data.subset) if rows is None else in_memory(rows)
    name = data.train if rows is None else IN_PYTHON
    train, origin = _split(source, "train", name)
    chosen = {
        split: _named(named, split, data.subset) if named is not None else _beside(source, split, name)
        for split, named in (("validation", data.validation), ("test", data.test))
    }
    found = {split: pair for split, pair in chosen.items() if pair is not None}
    if "validation" not in found and data.validation_fraction:
        if len(train) < 2:
            raise FileError(f"{name} has {len(train)} row, too few to set some aside; give --data.validation")
        # The places are divided, not the rows, so that an error can tell which row of the file it means.
        places = Dataset.from_dict({"place": range(len(train))})
        try:
            drawn = places.train_test_split(test_size=data.validation_fraction, seed=data.split_seed)
        except ValueError as error:
            raise ConfigError(
                f"data.validation_fraction is {data.validation_fraction}, of {len(train):,} rows in {name}, "
                "which leaves none to learn from; take a smaller one, or give --data.validation"
            ) from error
        kept, aside = (list(drawn[part]["place"]) for part in ("train", "test"))
        found["validation"] = train.select(aside), origin.select(aside)
        train, origin = train.select(kept), origin.select(kept)
    parts = {"train": (train, origin), **found}
    laid = {split: laid_out(Used(*pair), data) for split, pair in parts.items()}
    return Splits(
        **{split: used.rows for split, used in laid.items()},
        origins={split: used.origin for split, used in laid.items()},
        skipped={split: (used.skipped, used.first) for split, used in laid.items()},
    )


def load_test(source: str | Rows, subset: str | None = None) -> Used:
    """Read the rows to evaluate on: the test split of `source` if it has splits, else all of it."""
    found = read(source, subset) if isinstance(source, str) else in_memory(source)
    split = "test" if set(SPLITS["test"]) & set(found) else "train"
    return Used(*_split(found, split, source if isinstance(source, str) else IN_PYTHON))


def laid_out(used: Used, data: DataConfig) -> Used:
    """Rows as the preset's task reads them, if there is a preset.

    Raises:
        RowError: rows have another form, and the configuration does not say to leave them out.
    """
    rows, used = use(used, lambda rows: presets.lay_out(rows, data.preset), skip=data.skip_bad)
    return replace(used, rows=rows)


def in_memory(rows: Rows) -> dict[str, Dataset]:
    """Rows by split, of rows in memory.

    Raises:
        ConfigError: they are something else.
    """
    found = {"train": rows} if isinstance(rows, Dataset) else dict(rows) if isinstance(rows, Mapping) else {}
    if not found or not all(isinstance(each, Dataset) for each in found.values()):
        kind = f"a mapping with {listing(map(str, found))}" if found else type(rows).__name__
        raise ConfigError(
            f"rows in Python must be a datasets.Dataset, a DatasetDict or a mapping of splits to Datasets, "
            f"not {kind}; Dataset.from_list(rows) makes one of dictionaries"
        )
    return {str(split): each for split, each in found.items()}


def labelled(splits: Splits, data: DataConfig) -> Splits:
    """The splits without test rows that nobody named and that have no labels, as public data sets do."""
    if splits.test is None or data.test is not None:
        return splits
    columns = splits.test.column_names
    labels = [data.label] if data.label is not None else data.labels or []
    if not labels or data.references in columns:
        return splits
    absent = not set(labels) & set(columns)
    if data.label in columns:
        absent = all(label in (None, "", -1) for label in splits.test[data.label])
    return replace(splits, test=None) if absent else splits


def part(used: Used, split: str, data: DataConfig) -> Used:
    """Keep the part of a split's rows that a configuration asks for, drawn by `data.split_seed`.

    A smaller part of the same rows is contained in a larger one.

    Args:
        used: the split.
        split: its name, ``"train"``, ``"validation"`` or ``"test"``.
        data: `fraction` (of the training rows) and `train_rows`, `validation_rows`, `test_rows` count.

    Raises:
        ConfigError: it asks for more rows than there are.
    """
    total = len(used.rows)
    count = getattr(data, f"{split}_rows") or total
    if split == "train" and data.fraction is not None:
        count = max(1, round(data.fraction * total))
    if count > total:
        kind = "training" if split == "train" else split
        raise ConfigError(f"data.{split}_rows is {count:,}, of {total:,} {kind} rows in {used.origin.source}")
    if count == total:
        return used
    order = list(range(total))
    random.Random(data.split_seed).shuffle(order)
    return used.select(sorted(order[:count]))


def _named(source: str, split: str, subset: str | None) -> tuple[Dataset, Origin]:
    found = read(source, subset)
    return _split(found, split if set(SPLITS[split]) & set(found) else "train", source)


def _beside(source: dict[str, Dataset], split: str, where: str) -> tuple[Dataset, Origin] | None:
    return _split(source, split, where) if set(SPLITS[split]) & set(source) else None


def _split(source: dict[str, Dataset], split: str, where: str) -> tuple[Dataset, Origin]:
    name = next((name for name in SPLITS[split] if name in source), None)
    if name is None and len(source) == 1 and "#" in where:
        name = next(iter(source))
    if name is None:
        raise FileError(f"{where} has no {split} split; it has: {listing(source)}")
    if not len(source[name]):
        raise FileError(f"{where} has no rows in its {name} split")
    return source[name], Origin(describe(where, name))
