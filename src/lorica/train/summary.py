"""What a run says before it starts: its columns, its rows, how long they are, what is cut and left out."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from lorica.errors import listing
from lorica.train.preparing import Prepared
from lorica.train.sampler import padding
from lorica.train.tasks import Encoded


def announce(prepared: Prepared, console: Console) -> None:
    """Print it."""
    data, training = prepared.recipe.data, prepared.recipe.training
    columns = " + ".join(prepared.task.inputs(data))
    rows = ", ".join(f"{len(rows):,} {split}" for split, rows in prepared.splits.items())
    classes = f" ({listing(data.labels, limit=6)})" if data.labels else ""
    target = f" → {data.label}{classes}" if data.label else f" →{classes}" if classes else ""
    console.print(f"{prepared.recipe.model}: {columns}{target}; {rows} rows")
    for remark in prepared.task.remarks(data):
        console.print(remark)
    for split, facts in prepared.data.items():
        if facts["skipped"]:
            console.print(
                f"{facts['skipped']:,} {split} rows are left out, the first of them because "
                f"{facts['first_skipped']}"
            )
    train = prepared.splits["train"]
    if train.lengths:
        console.print(lengths(train))
    for split, encoded in prepared.splits.items():
        if encoded.truncated:
            console.print(
                f"{encoded.truncated:,} of {len(encoded):,} {split} rows "
                f"({encoded.truncated / len(encoded):.1%}) are cut to {training.max_length} tokens; "
                f"the longest has {encoded.longest:,}"
            )
    saved = padding(train.features["length"], training.batch_size, training.seed)
    if training.group_by_length and saved is not None:
        console.print(
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
