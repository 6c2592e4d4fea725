"""The rows of a run: their number, form and lengths, those that are cut, those that are there twice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console

from lorica.errors import listing
from lorica.train import prepared
from lorica.train.console import quiet, waiting
from lorica.train.data.mapped import SAMPLE
from lorica.train.data.splits import Rows
from lorica.train.preview.answers import balance_of, learned_of, seen_answers
from lorica.train.preview.seen import Seen, seen
from lorica.train.recipe import Recipe
from lorica.train.settings import DataConfig
from lorica.train.tasks import Encoded, Task
from lorica.train.tasks.packing import pack
from lorica.train.tasks.post.answers import PostTask

_IGNORED = -100


@dataclass(frozen=True)
class SplitReport:
    """The rows of a split.

    Args:
        rows: rows that are used.
        skipped: rows that cannot be used, and are left out.
        lengths: tokens a row before any is cut: ``least``, ``median``, ``95 %``, ``most``. Empty for images.
        cut: rows that are cut to the longest length allowed.
        longest_allowed: that length, in tokens.
        targets: tokens that are learned, of a task whose answer is a text; else 0.
        duplicates: rows that say the same as an earlier one, label included.
        contradictions: rows that read the same as an earlier one, and are to be answered otherwise.
        in_training: rows of another split that read the same as a training row.
        labels: class → number of rows that have it; empty where there are no classes.
    """

    rows: int
    skipped: int
    lengths: dict[str, int]
    cut: int
    longest_allowed: int
    targets: int
    duplicates: int
    contradictions: int
    in_training: int
    labels: dict[str, int]


@dataclass(frozen=True)
class DataReport:
    """The rows of a run, counted.

    Args:
        task: the task's name.
        model: the model whose tokenizer read the rows.
        data: columns and labels, as they were found.
        notes: how the rows were read; whole lines, such as the form that was recognised.
        splits: each split's rows.
        packing: a line about the sequences that the training rows are packed into; None where they are not.
        first: the first training rows as the model will see them.
    """

    task: str
    model: str
    data: DataConfig
    notes: tuple[str, ...]
    splits: dict[str, SplitReport]
    packing: str | None
    first: tuple[Seen, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """The text before the first rows."""
        yield from self.notes
        for name, split in self.splits.items():
            yield f"{name}: {', '.join(_told(name, split))}"
        if self.packing is not None:
            yield self.packing


def preview(
    recipe: Recipe, rows: Rows | None = None, *, first: int = 2, console: Console | None = None
) -> DataReport:
    """Read and encode the rows of a recipe, and describe them. No model is loaded, only its tokenizer.

    Args:
        recipe: the run.
        rows: rows in memory, in place of those that `recipe.data.train` names.
        first: training rows to show as the model will see them.
        console: shows progress. None is silent.

    Raises:
        LoricaError: something is missing or does not fit, as training would raise it.
    """
    with waiting(console, "reading the rows"):
        recipe, task, used = prepared.read(recipe, rows)
    data, training = recipe.data, recipe.training
    notes: list[str] = []
    splits: dict[str, SplitReport] = {}
    train = None
    before: set[bytes] = set()
    with quiet():
        tokenizer = task.tokenizer(recipe.model)
        for name, part in used.items():
            if data.streaming and len(part.rows) > SAMPLE:
                notes.append(
                    f"{part.origin.source}: of {len(part.rows):,} {name} rows on disk, the first {SAMPLE:,}"
                )
                part = part.select(range(SAMPLE))
            with waiting(console, f"encoding {len(part.rows):,} {name} rows"):
                encoded, part = prepared.encode_split(recipe, task, tokenizer, part)
            notes += prepared.notes_on(task, data, part, training=name == "train")
            limit = min(training.max_length, getattr(tokenizer, "model_max_length", training.max_length))
            read = _hashes(part.rows, task.inputs(data))
            splits[name] = _split(task, data, part.rows, encoded, part.skipped, limit, read, before)
            if name == "train":
                train, before = encoded, set(read)
    assert train is not None
    told = None
    if training.packing:
        packed = pack(train, training.packed_length or training.max_length)
        told = prepared.packing(packed, training, by_length=task.by_length(training))
    features = train.features
    show = functools.partial(seen_answers if isinstance(task, PostTask) else seen, task)
    shown = [show(features[place], tokenizer, data) for place in range(min(first, len(features)))]
    return DataReport(task.name, recipe.model, data, tuple(dict.fromkeys(notes)), splits, told, tuple(shown))


def _split(
    task: Task,
    data: DataConfig,
    rows: Dataset,
    encoded: Encoded,
    skipped: int,
    limit: int,
    read: Sequence[bytes],
    before: set[bytes],
) -> SplitReport:
    whole = _hashes(rows, [name for name in task.columns(data) if name in rows.column_names])
    duplicates = len(whole) - len(set(whole))
    # Of rows that read the same, each that says something new. A prompt may well have several answers.
    post = isinstance(task, PostTask)
    contradictions = 0 if post else len(set(whole)) - len(set(read))
    lengths = {}
    if encoded.lengths:
        found = np.percentile(encoded.lengths, [0, 50, 95, 100])
        names = ("least", "median", "95 %", "most")
        lengths = {name: round(float(value)) for name, value in zip(names, found, strict=True)}
    features = encoded.features
    labels = features["labels"] if "labels" in features.column_names else []
    targets = 0
    if post:
        targets = learned_of(task, features)
    elif task.writes:
        targets = sum(label != _IGNORED for each in labels for label in each[1:])
    return SplitReport(
        rows=len(encoded),
        skipped=skipped,
        lengths=lengths,
        cut=encoded.truncated,
        longest_allowed=limit,
        targets=targets,
        duplicates=duplicates,
        contradictions=contradictions,
        in_training=sum(each in before for each in read),
        labels=balance_of(features) if post else _balance(labels, data.labels or []),
    )


def _hashes(rows: Dataset, columns: Sequence[str]) -> list[bytes]:
    """A short hash of each row's content in some columns; rows of a run may be larger than memory."""
    columns = [name for name in columns if name in rows.column_names]
    plain = rows.select_columns(columns).with_format("arrow")
    found: list[bytes] = []
    for batch in plain.iter(batch_size=1000):
        for row in batch.to_pylist():  # type: ignore[union-attr]
            text = json.dumps(row, sort_keys=True, default=str).encode()
            found.append(hashlib.blake2b(text, digest_size=12).digest())
    return found


def _balance(labels: Any, names: Sequence[str]) -> dict[str, int]:
    """Number of rows of each class."""
    if not names:
        return {}
    counts: Counter[int] = Counter()
    for label in labels:
        if not isinstance(label, list):
            counts[label] += 1
        elif label and isinstance(label[0], float):  # several classes a row, each 0 or 1
            counts.update(place for place, value in enumerate(label) if value)
        else:
            counts.update(place for place in label if place != _IGNORED)
    return {name: counts[place] for place, name in enumerate(names)}


def _told(name: str, split: SplitReport) -> Iterator[str]:
    yield f"{split.rows:,} rows"
    if split.skipped:
        yield f"{split.skipped:,} more left out"
    if lengths := split.lengths:
        yield (
            f"{lengths['least']:,} to {lengths['most']:,} tokens a row ({lengths['median']:,} in the median, "
            f"95 % up to {lengths['95 %']:,})"
        )
    if split.targets:
        yield f"{split.targets:,} tokens learned" if name == "train" else f"{split.targets:,} targets"
    cut = f" ({split.cut / split.rows:.1%})" if split.cut else ""
    if split.lengths:
        yield f"{split.cut:,} cut to {split.longest_allowed:,}{cut}"
    yield f"{split.duplicates:,} duplicates"
    if split.contradictions:
        yield f"{split.contradictions:,} that read the same as another and are answered otherwise"
    if split.in_training:
        yield f"{split.in_training:,} that training rows hold too"
    if split.labels:
        yield balance(split.labels)


def balance(labels: Mapping[str, int]) -> str:
    """The classes and their numbers of rows, the most frequent first."""
    total = sum(labels.values()) or 1
    ordered = sorted(labels.items(), key=lambda pair: -pair[1])
    return listing((f"{name} {count:,} ({count / total:.0%})" for name, count in ordered), limit=8)
