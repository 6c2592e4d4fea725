"""What a run says before it starts: its columns, its rows, how long they are, what is cut and left out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console

from lorica.errors import listing
from lorica.train.preparing import Prepared
from lorica.train.sampler import padding
from lorica.train.tasks import Encoded


def announce(prepared: Prepared, console: Console) -> None:
    """Print it."""
    for line in lines(prepared):
        # A row's own text may be in it: brackets are no markup then, and its end is worth having.
        console.print(line, markup=False, soft_wrap=True)


def lines(prepared: Prepared) -> Iterator[str]:
    """What is printed."""
    data, training = prepared.recipe.data, prepared.recipe.training
    columns = " + ".join(prepared.task.inputs(data))
    rows = ", ".join(f"{len(rows):,} {split}" for split, rows in prepared.splits.items())
    classes = f" ({listing(data.labels, limit=6)})" if data.labels else ""
    target = f" → {data.label}{classes}" if data.label else f" →{classes}" if classes else ""
    yield f"{prepared.recipe.model}: {columns}{target}; {rows} rows"
    if prepared.unlabelled is not None:
        yield f"{prepared.unlabelled} has no labels, and is not scored"
    yield from prepared.notes
    yield from prepared.task.remarks(data)
    for split, facts in prepared.data.items():
        if facts["skipped"]:
            yield (
                f"{facts['skipped']:,} {split} rows are left out, the first of them because "
                f"{facts['first_skipped']}"
            )
    train = prepared.splits["train"]
    if train.lengths:
        yield lengths(train)
    if len(train) != len(train.features):
        longest = max(train.features["length"])
        yield f"{len(train):,} training rows are read as {len(train.features):,} of up to {longest:,} tokens"
    limit = min(training.max_length, getattr(prepared.tokenizer, "model_max_length", training.max_length))
    for split, encoded in prepared.splits.items():
        if encoded.truncated:
            yield (
                f"{encoded.truncated:,} of {len(encoded):,} {split} rows "
                f"({encoded.truncated / len(encoded):.1%}) are cut to {limit} tokens; "
                f"the longest has {encoded.longest:,}"
            )
    saved = padding(train.features["length"], training.batch_size, training.seed)
    if training.group_by_length and saved is not None:
        yield (
            f"batches of similar lengths: {saved.grouped:.0%} of what the model reads is padding, in a "
            f"random order {saved.random:.0%}"
        )


def lengths(encoded: Encoded) -> str:
    """How long the rows are, in tokens, before any is cut."""
    low, middle, high, most = np.percentile(encoded.lengths or [0], [0, 50, 95, 100])
    return (
        f"tokens a training row: {low:,.0f} at least, {middle:,.0f} in the median, 95 % have up to "
        f"{high:,.0f}, {most:,.0f} at most"
    )
