"""What `paper_tables.py` runs for each of the paper's tables: the file, what is cut, what the paper says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Statement(NamedTuple):
    """Two groups of methods, of which the paper has the first above the second, or both level.

    Args:
        says: the paper's statement.
        paper: its figures.
        first: names of methods; their mean counts.
        second: the others.
        level: whether the paper finds them level.
        size: of which number of training rows, or None.
        metric: by which metric, or None for the one that decides.
        task: on which task, or None for the only one.
    """

    says: str
    paper: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    level: bool = False
    size: int | None = None
    metric: str | None = None
    task: str | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """One of the paper's tables, as a comparison file cut to what a processor does in minutes.

    Args:
        file: in recipes/compare.
        title: of the result.
        cut: fields over the file's, merged into it.
        tasks: tasks in place of the file's; empty keeps them.
        rates: method or series → learning rates in place of the file's; ``"*"`` is for all others.
        only: tasks of the file to run; empty runs all.
        methods: methods of the file to run; empty runs all.
        own: the paper's figures: ``caption``, ``columns``, ``rows``.
        statements: what the paper reads off them.
        decoder: whether the model is the small decoder of `small_decoder`.
        grid: whether to show scores by series and rank.
        apart: by how much methods with one seed must differ to be told apart; None takes twice what is level.
    """

    file: str
    title: str
    cut: dict[str, Any]
    own: dict[str, Any]
    statements: tuple[Statement, ...]
    tasks: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    decoder: bool = False
    grid: bool = False
    apart: float | None = None


RANKS = (1, 4, 64)
SMALL = {
    "train_rows": 2000,
    "validation_fraction": 0.0075,  # 505 rows
}

FEWER = {"validation_fraction": 0.002, "test_rows": 436}


def training(**more: Any) -> dict[str, Any]:
    """A recipe whose runs are short."""
    return {"training": {"epochs": 1, "batch_size": 16, "bf16": True, **more}}


def above(
    says: str, paper: str, first: str | tuple[str, ...], second: str | tuple[str, ...], **more: Any
) -> Statement:
    """The paper has the first above the second; each is a method or several."""
    one, two = ((of,) if isinstance(of, str) else of for of in (first, second))
    return Statement(says, paper, one, two, **more)


def level(
    says: str, paper: str, first: str | tuple[str, ...], second: str | tuple[str, ...], **more: Any
) -> Statement:
    """The paper has both level."""
    return above(says, paper, first, second, level=True, **more)


def ranks(series: str, *of: int) -> tuple[str, ...]:
    """The methods of a series at some ranks."""
    return tuple(f"{series} r={r}" for r in of or RANKS)


TABLE_5 = Study(
    file="fixed-budget",
    title="The paper's table 5: which matrices, under a fixed budget",
    cut={"recipe": training(), "tasks": {"SST-2": {"data": SMALL}}, "seeds": [0, 1]},
    rates={"*": [4e-3]},
    own={
        "caption": "The paper's: GPT-3, 18 million parameters.",
        "columns": ["", "q", "k", "v", "o", "q, k", "q, v", "q, k, v, o"],
        "rows": [
            ["rank", 8, 8, 8, 8, 4, 4, 2],
            ["WikiSQL", 70.4, 70.0, 73.0, 73.2, 71.4, "**73.7**", "**73.7**"],
            ["MNLI", 91.0, 90.8, 91.0, 91.3, 91.3, 91.3, "**91.7**"],
        ],
    },
    statements=(
        above("q and v do better than q alone", "73.7, 70.4; 91.3, 91.0", "q, v", "q"),
        above("than k alone", "73.7, 70.0; 91.3, 90.8", "q, v", "k"),
        above("than q and k", "73.7, 71.4; 91.3, 91.3", "q, v", "q, k"),
        level(
            "all four are level with q and v",
            "73.7, 73.7; 91.7, 91.3",
            "q, k, v, o",
            "q, v",
        ),
        above(
            "two or four matrices of a smaller rank do better than one of a larger",
            "73.7, 71.7; 91.5, 91.0",
            ("q, v", "q, k, v, o"),
            ("q", "k", "v", "o"),
        ),
        above("v does better than q", "73.0, 70.4; 91.0, 91.0", "v", "q"),
        above("o does better than q", "73.2, 70.4; 91.3, 91.0", "o", "q"),
    ),
)

TABLE_6 = Study(
    file="rank-sweep",
    title="The paper's table 6: which rank is enough",
    cut={"recipe": training(), "tasks": {"SST-2": {"data": SMALL}}, "seeds": [0, 1], "keep": True},
    rates={"q, v r=64": [1e-3, 4e-3], "q, k, v, o r=64": [1e-3, 4e-3], "*": [4e-3]},  # there it is too much
    methods=tuple(f"{series} r={r}" for series in ("q", "q, v", "q, k, v, o") for r in RANKS),
    grid=True,
    own={
        "caption": "The paper's: GPT-3, WikiSQL / MNLI.",
        "columns": ["", *(f"r = {r}" for r in (1, 2, 4, 8, 64))],
        "rows": [
            ["q", "68.8 / 90.7", "69.6 / 90.9", "70.5 / 91.1", "70.4 / 90.7", "70.0 / 90.7"],
            ["q, v", "73.4 / 91.3", "73.3 / 91.4", "73.7 / 91.3", "73.8 / 91.6", "73.5 / 91.4"],
            ["q, k, v, o", "74.1 / 91.2", "73.7 / 91.7", "74.0 / 91.7", "74.0 / 91.5", "73.9 / 91.4"],
        ],
    },
    statements=(
        level(
            "rank 1 is enough for q and v: level with 64",
            "73.4, 73.5; 91.3, 91.4",
            ranks("q, v", 1),
            ranks("q, v", 64),
        ),
        level(
            "and for all four",
            "74.1, 73.9; 91.2, 91.4",
            ranks("q, k, v, o", 1),
            ranks("q, k, v, o", 64),
        ),
        above("q alone needs more than rank 1", "70.5, 68.8; 91.1, 90.7", ranks("q", 4), ranks("q", 1)),
        above(
            "q and v do better than q, over the ranks", "73.5, 69.8; 91.3, 90.8", ranks("q, v"), ranks("q")
        ),
        above(
            "q and v at rank 1 do better than q at rank 64",
            "73.4, 70.0; 91.3, 90.7",
            ranks("q, v", 1),
            ranks("q", 64),
        ),
        level(
            "all four are level with q and v, over the ranks",
            "74.0, 73.5; 91.4, 91.3",
            ranks("q, k, v, o"),
            ranks("q, v"),
        ),
    ),
)

TABLE_16 = Study(
    file="low-data",
    title="The paper's tables 16 and 17: few rows",
    cut={
        "recipe": {"training": {"batch_size": 16, "bf16": True, "max_steps": 100, "eval_steps": 100}},
        "tasks": {"SST-2": {"data": FEWER}},
        "seeds": [0, 1],
        "sizes": [100, 1000],
    },
    rates={"FT": [1e-4], "LoRA": [2e-3], "*": [1e-2]},
    own={
        "caption": "The paper's: GPT-3 on n rows of MNLI, three classes (40, 40 and 4 passes; table 17).",
        "columns": ["", "n = 100", "n = 1,000", "n = 10,000"],
        "rows": [
            ["FT", 60.2, "**85.8**", 88.9],
            ["PreEmbed", 37.6, 75.2, 79.5],
            ["PreLayer", 48.3, 82.5, 85.9],
            ["LoRA", "**63.8**", 85.6, "**89.2**"],
        ],
    },
    statements=(
        above("LoRA is above full fine-tuning", "63.8, 60.2", "LoRA", "FT", size=100),
        level("they are level", "85.6, 85.8", "LoRA", "FT", size=1000),
        *(
            above(f"{one} is above {other}", paper, one, other, size=size)
            for one, other, figures in (
                ("LoRA", "PreLayer", ("63.8, 48.3", "85.6, 82.5")),
                ("PreLayer", "PreEmbed", ("48.3, 37.6", "82.5, 75.2")),
            )
            for size, paper in zip((100, 1000), figures, strict=True)
        ),
    ),
)

PREFIXES, LORAS = ("PreEmbed 32+4", "PreEmbed 128+4"), ("LoRA r=1", "LoRA r=64")
TABLE_15 = Study(
    file="sizes",
    title="The paper's table 15 and figure 2: quality by parameters, and LoRA beside prefixes",
    cut={"recipe": training(), "tasks": {"SST-2": {"data": {"train_rows": 2000, **FEWER}}}, "seeds": [0, 1]},
    methods=(
        *(
            "PreEmbed 32+4",
            "PreEmbed 128+4",
            "PreLayer 16+4",
            "PreLayer 64+4",
            "AdapterH r=1",
            "AdapterH r=8",
        ),
        *("LoRA r=1", "LoRA r=8", "LoRA r=64", "LoRA r=8 + PreEmbed 8+4", "LoRA r=8 + PreLayer 8+4"),
    ),
    rates={
        "PreEmbed": [3e-2],
        "PreLayer": [3e-2],
        "AdapterH": [3e-3],
        "LoRA": [3e-3],
        "*": [1e-2],
    },
    own={
        "caption": "The paper's: GPT-3, WikiSQL / MNLI, from its smallest size to its largest.",
        "columns": ["", "", "", "", "", ""],
        "rows": [
            ["FT", "73.8 / 89.5", "", "", "", ""],
            [
                "PreEmbed, l_p = 32, 64, 128, 256, 512",
                "55.9 / 84.9",
                "58.7 / 88.1",
                "60.6 / 88.0",
                "63.1 / 88.6",
                "55.9 / 85.8",
            ],
            [
                "PreLayer, l_p = 2, 8, 8, 32, 64",
                "68.5 / 89.2",
                "69.8 / 88.2",
                "70.1 / 89.5",
                "66.4 / 89.6",
                "64.9 / 87.9",
            ],
            [
                "AdapterH, r = 1, 4, 8, 16, 64",
                "71.9 / 89.8",
                "73.2 / 91.0",
                "73.2 / 91.5",
                "73.2 / 91.5",
                "72.6 / 91.5",
            ],
            ["LoRA, q and v r = 1, 4, 8, 64", "73.4 / 91.3", "73.7 / 91.3", "73.8 / 91.6", "73.5 / 91.4", ""],
            ["LoRA+PreEmbed 8+4, r = 8, 32, 64", "75.0 / 91.4", "75.9 / 91.1", "76.2 / 91.3", "", ""],
            ["LoRA+PreLayer 8+4, r = 8", "72.9 / 90.2", "", "", "", ""],
        ],
    },
    statements=(
        level(
            "LoRA with PreEmbed is level with LoRA (MNLI; above it on WikiSQL)",
            "75.0, 73.8; 91.4, 91.6",
            "LoRA r=8 + PreEmbed 8+4",
            "LoRA r=8",
        ),
        above(
            "LoRA with PreLayer is below LoRA",
            "73.8, 72.9; 91.6, 90.2",
            "LoRA r=8",
            "LoRA r=8 + PreLayer 8+4",
        ),
        above(
            "the longest PreEmbed is worse than a shorter one",
            "63.1, 55.9; 88.6, 85.8",
            PREFIXES[:1],
            PREFIXES[1:],
        ),
        above(
            "the longest PreLayer is worse than a shorter one",
            "70.1, 64.9; 89.5, 87.9",
            "PreLayer 16+4",
            "PreLayer 64+4",
        ),
        level(
            "LoRA hardly gains from rank 1 to 64",
            "73.4, 73.5; 91.3, 91.4",
            *LORAS,
        ),
        above(
            "AdapterH gains from the smallest size on",
            "73.2, 71.9; 91.5, 89.8",
            "AdapterH r=8",
            "AdapterH r=1",
        ),
        above("LoRA is above AdapterH", "73.8, 73.2; 91.6, 91.5", "LoRA r=8", "AdapterH r=8"),
        above("AdapterH is above PreLayer", "73.2, 70.1; 91.5, 89.5", "AdapterH r=8", "PreLayer 16+4"),
        above("PreLayer is above PreEmbed", "70.1, 63.1; 89.5, 88.6", "PreLayer 16+4", "PreEmbed 32+4"),
    ),
)

LEARNING = {"5": TABLE_5, "6": TABLE_6, "15": TABLE_15, "16": TABLE_16}
