"""What the paper's tables say of two methods, and whether a comparison of ours says it too."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lorica.compare.table import Score, Table


class Pair(NamedTuple):
    """Two methods, the better one first, and the paper's figures of them."""

    better: str
    worse: str
    paper: str


PAIRS = {
    "classification": (
        Pair("LoRA", "FT", "87.2, 86.4: GLUE, RoBERTa-base (table 2)"),
        Pair("LoRA", "BitFit", "87.2, 85.2: GLUE, RoBERTa-base (table 2)"),
        Pair("LoRA", "AdapterD", "87.2, 85.4: GLUE, RoBERTa-base (table 2)"),
        Pair("LoRA", "AdapterP", "88.6, 88.4: GLUE, RoBERTa-large (table 2)"),
        Pair("LoRA", "AdapterH", "88.6, 87.8: GLUE, RoBERTa-large (table 2)"),
        Pair("LoRA", "PreEmbed", "91.7, 88.6: MNLI, GPT-3 (table 4)"),
        Pair("LoRA", "PreLayer", "91.7, 89.5: MNLI, GPT-3 (table 4)"),
        Pair("FT", "BitFit", "86.4, 85.2: GLUE, RoBERTa-base (table 2)"),
        Pair("BitFit", "PreEmbed", "91.0, 88.6: MNLI, GPT-3 (table 4)"),
        Pair("LoRA", "LoRA+PreEmbed", "91.7, 91.4: MNLI, GPT-3 (table 15)"),
        Pair("LoRA", "LoRA+PreLayer", "91.7, 90.2: MNLI, GPT-3 (table 15)"),
    ),
    "generation": (
        Pair("LoRA", "FT", "70.4, 68.2: E2E, GPT-2 medium (table 3)"),
        Pair("LoRA", "FT-Top2", "70.4, 68.1: E2E, GPT-2 medium (table 3)"),
        Pair("LoRA", "AdapterL", "70.4, 68.9: E2E, GPT-2 medium (table 3)"),
        Pair("LoRA", "AdapterH", "70.4, 67.3: E2E, GPT-2 medium (table 3)"),
        Pair("LoRA", "PreLayer", "70.4, 69.7: E2E, GPT-2 medium (table 3)"),
        Pair("PreLayer", "FT", "69.7, 68.2: E2E, GPT-2 medium (table 3)"),
        Pair("LoRA+PreEmbed", "LoRA", "76.2, 73.4: WikiSQL, GPT-3 (table 15)"),
        Pair("LoRA", "LoRA+PreLayer", "73.4, 72.9: WikiSQL, GPT-3 (table 15)"),
    ),
}


def verdict(better: Score, worse: Score) -> str:
    """The difference of the two centres, and whether it is the paper's.

    It is nobody's where it is smaller than the seeds' deviation, of which the mean square of both is taken.
    """
    if better.centre is None or worse.centre is None:
        return ""
    difference = better.centre - worse.centre
    noise = math.sqrt(((better.deviation or 0) ** 2 + (worse.deviation or 0) ** 2) / 2)
    says = "not told apart" if abs(difference) <= noise else "yes" if difference > 0 else "no"
    scale = 100 if better.is_share and worse.is_share else 1
    return f"{says} ({scale * difference:+.1f})"


def tally(rows: list[list[str]]) -> str:
    """How many of the orderings in `ordering`'s rows are the paper's."""
    said = [cell for row in rows for cell in row[2:]]
    yes, no = (sum(cell.startswith(word) for cell in said) for word in ("yes", "no ("))
    apart = sum(cell.startswith("not told") for cell in said)
    return f"Of {len(said)} orderings {yes} are the paper's, {no} are not, {apart} are not told apart"


def ordering(file: str, table: Table, tasks: list[str]) -> dict[str, Any]:
    """A row a pair, a column a task."""
    found = {(score.method, score.task): score for score in table.deciding}
    return {
        "caption": "Is the first better than the second, as in the paper? In points; not told apart "
        "where the difference is within the seeds' deviation.",
        "columns": ["", "the paper's figures", *tasks],
        "rows": [
            [
                f"{pair.better} over {pair.worse}",
                pair.paper,
                *(verdict(found[pair.better, task], found[pair.worse, task]) for task in tasks),
            ]
            for pair in PAIRS[file]
        ],
    }
