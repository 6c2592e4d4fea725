"""The rows of a run: which are learned from, which choose the best checkpoint, which give the score."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from lorica.errors import ConfigError, FileError, listing
from lorica.train import presets
from lorica.train.data.mapped import MOST_VALIDATION
from lorica.train.data.rows import Origin, RowError, UsableRows, act_on_rows
from lorica.train.data.running import CONTINUES
from lorica.train.data.sources import IN_PYTHON, SPLITS, describe, find_rows, folder_of
from lorica.train.data.sources import read as read
from lorica.train.data.tables import Form, Found
from lorica.train.data.tables import Rows as Rows
from lorica.train.data.tables import in_memory as in_memory
from lorica.train.settings import DataConfig


@dataclass(frozen=True)
class Splits:
    """The rows of a run, as they came.

    Args:
        train: rows to learn from.
        validation: rows that choose the best checkpoint, or None.
        test: rows for the final score, or None.
        origins: where each split's rows came from.
        skipped: split → number of rows that could not be used, and the fault of the first.
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

    def used(self) -> dict[str, UsableRows]:
        """Rows of each split there is, and where they came from."""
        return {
            name: UsableRows(
                rows, self.origins.get(name) or Origin(f"the {name} rows"), *self.skipped.get(name, (0, None))
            )
            for name, rows in self.items()
        }


def load(
    data: DataConfig, rows: Rows | None = None, *, tagged: bool = False, running: bool = False
) -> Splits:
    """Read the rows that a configuration names.

    Args:
        data: where they are. Where it names no validation or test rows, the split of that name beside the
            training rows is taken; failing that, validation rows are drawn from the training rows.
        rows: rows in memory, to take in place of those that `data.train` names.
        tagged: whether a ``.txt`` file holds words and their classes, and not texts.
        running: whether a ``.txt`` file may be one running text, where the configuration does not say.

    Returns:
        The splits, none of them empty.

    Raises:
        FileError: something is missing, empty or unreadable.
        RowError: rows of a file are broken, and the configuration does not say to leave them out.
    """
    form = _form(data, tagged=tagged, running=running)
    source = find_rows(data.train, data.subset, form) if rows is None else in_memory(rows)
    name = data.train if rows is None else IN_PYTHON
    train = _split(source, "train", name, skip=data.skip_bad)
    found: dict[str, UsableRows] = {}
    for split, named in (("validation", data.validation), ("test", data.test)):
        if named is not None:
            own = find_rows(named, data.subset, form)
            part = split if set(SPLITS[split]) & set(own) else "train"
            found[split] = _split(own, part, named, skip=data.skip_bad)
        elif set(SPLITS[split]) & set(source):
            found[split] = _split(source, split, name, skip=data.skip_bad)
    if "validation" not in found and data.validation_fraction:
        if len(train.rows) < 2:
            raise FileError(
                f"{name} has {len(train.rows)} row, too few to set some aside; give --data.validation"
            )
        try:
            kept, aside = _drawn(train, data)
        except ValueError as error:
            raise ConfigError(
                f"data.validation_fraction is {data.validation_fraction}, of {len(train.rows):,} rows in "
                f"{name}, "
                "which leaves none to learn from; take a smaller one, or give --data.validation"
            ) from error
        found["validation"] = replace(train.select(aside), skipped=0, first=None)
        train = train.select(kept)
    parts = {split: in_preset_layout(used, data) for split, used in {"train": train, **found}.items()}
    return Splits(
        **{split: used.rows for split, used in parts.items()},
        origins={split: used.origin for split, used in parts.items()},
        skipped={split: (used.skipped, used.first) for split, used in parts.items()},
    )


def load_test(
    source: str | Path | Rows,
    data: DataConfig | None = None,
    *,
    tagged: bool = False,
    running: bool = False,
) -> UsableRows:
    """Read the rows to evaluate on: the test split of `source` if it has splits, else all of it.

    Args:
        source: where they are, or the rows.
        data: how files are written, and whether broken rows are left out.
        tagged: as in `load`.
        running: as in `load`.
    """
    data = data or DataConfig()
    source = str(source) if isinstance(source, Path) else source
    form = _form(data, tagged=tagged, running=running)
    found = find_rows(source, data.subset, form) if isinstance(source, str) else in_memory(source)
    split = "test" if set(SPLITS["test"]) & set(found) else "train"
    return _split(found, split, source if isinstance(source, str) else IN_PYTHON, skip=data.skip_bad)


def in_preset_layout(used: UsableRows, data: DataConfig) -> UsableRows:
    """Rows as the preset's task reads them, if there is a preset.

    Raises:
        RowError: rows have another form, and the configuration does not say to leave them out.
    """
    if data.preset is None:
        return used
    rows, used = act_on_rows(used, lambda rows: presets.lay_out(rows, data.preset), skip=data.skip_bad)
    return replace(used, rows=rows)


def without_unlabelled(splits: Splits, data: DataConfig) -> Splits:
    """The splits without test rows that nobody named and that have no labels, as public data sets do."""
    if splits.test is None or data.test is not None:
        return splits
    columns = splits.test.column_names
    labels = [data.label] if data.label is not None else data.labels or []
    if not labels or data.references in columns:
        return splits
    absent = not set(labels) & set(columns)
    if data.label in columns:
        absent = all(label in (None, "", -1, "-1") for label in splits.test[data.label])
    return replace(splits, test=None) if absent else splits


def keep_part(used: UsableRows, split: str, data: DataConfig) -> UsableRows:
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
    if not _runs_on(used, data):
        random.Random(data.split_seed).shuffle(order)
    return used.select(sorted(order[:count]))


def _drawn(train: UsableRows, data: DataConfig) -> tuple[list[int], list[int]]:
    """Places of the rows that are learned from, and of those that are set aside.

    Raises:
        ValueError: nothing would be left of either.
    """
    count = len(train.rows)
    if data.streaming:
        size = max(1, min(round(data.validation_fraction * count), MOST_VALIDATION))
        aside = sorted(random.Random(data.split_seed).sample(range(count), size))
        return np.delete(np.arange(count), aside).tolist(), aside
    # The places are divided, not the rows, so that an error can tell which row of the file it means.
    places = Dataset.from_dict({"place": range(count)})
    drawn = places.train_test_split(
        test_size=data.validation_fraction, seed=data.split_seed, shuffle=not _runs_on(train, data)
    )
    return list(drawn["train"]["place"]), list(drawn["test"]["place"])


def _form(data: DataConfig, *, tagged: bool, running: bool) -> Form:
    """The form of files, as far as it is known; whether a text runs on may be looked for."""
    found = data.running if data.running is not None else None if running else False
    return Form(data.encoding, data.columns, tagged, found, data.streaming)


def _runs_on(used: UsableRows, data: DataConfig) -> bool:
    """Whether rows are pieces of running texts, of which a part is taken in one piece."""
    if data.streaming:
        return False
    names = [name for name in used.rows.column_names if name == data.continues or name.lower() == CONTINUES]
    return bool(names) and data.label is None and any(used.rows[names[0]])


def _split(source: Mapping[str, Found], split: str, where: str, *, skip: bool) -> UsableRows:
    name = next((name for name in SPLITS[split] if name in source), None)
    if name is None and len(source) == 1 and "#" in where:
        name = next(iter(source))
    if name is None:
        raise FileError(f"{where} has no {split} split; it has: {listing(source)}")
    found = source[name]
    if not len(found.rows):
        raise FileError(f"{where} has no rows in its {name} split")
    folder = None if where == IN_PYTHON else folder_of(where)
    origin = Origin(describe(where, name), lines=found.lines, notes=found.notes, folder=folder)
    used = UsableRows(found.rows, origin)

    def whole(rows: Dataset) -> None:
        if found.broken and len(rows) == len(found.rows):
            raise RowError(list(found.broken), "the rows", next(iter(found.broken.values())))

    return act_on_rows(used, whole, skip=skip)[1]
