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
    """

    says: str
    paper: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    level: bool = False
    size: int | None = None
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """One of the paper's tables, as a comparison file cut to what a processor does in minutes.

    Args:
        file: in recipes/compare.
        title: of the result.
        cut: fields over the file's, merged into it.
        tasks: tasks in place of the file's; empty keeps them.
        rates: method or series → learning rates in place of the file's; ``"*"`` is for all others.
        methods: methods of the file to run; empty runs all.
        own: the paper's figures: ``caption``, ``columns``, ``rows``.
        statements: what the paper reads off them.
        decoder: whether the model is the small decoder of `small_decoder`.
        grid: whether to show scores by series and rank.
    """

    file: str
    title: str
    cut: dict[str, Any]
    own: dict[str, Any]
    statements: tuple[Statement, ...]
    tasks: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    decoder: bool = False
    grid: bool = False


RANKS = (1, 4, 64)
SMALL = {
    "train_rows": 2000,
    "validation_fraction": 0.0075,  # 505 rows
}

FEWER = {"validation_fraction": 0.002, "test_rows": 436}


def training(**more: Any) -> dict[str, Any]:
    """A recipe whose runs are short."""
    return {"training": {"epochs": 1, "batch_size": 16, "bf16": True, **more}}


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
        Statement("q and v do better than q alone", "73.7, 70.4; 91.3, 91.0", ("q, v",), ("q",)),
        Statement("than k alone", "73.7, 70.0; 91.3, 90.8", ("q, v",), ("k",)),
        Statement("than q and k", "73.7, 71.4; 91.3, 91.3", ("q, v",), ("q, k",)),
        Statement(
            "all four are level with q and v",
            "73.7, 73.7; 91.7, 91.3",
            ("q, k, v, o",),
            ("q, v",),
            level=True,
        ),
        Statement(
            "two or four matrices of a smaller rank do better than one of a larger",
            "73.7, 71.7; 91.5, 91.0",
            ("q, v", "q, k, v, o"),
            ("q", "k", "v", "o"),
        ),
        Statement("v does better than q", "73.0, 70.4; 91.0, 91.0", ("v",), ("q",)),
        Statement("o does better than q", "73.2, 70.4; 91.3, 91.0", ("o",), ("q",)),
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
        Statement(
            "rank 1 is enough for q and v: level with 64",
            "73.4, 73.5; 91.3, 91.4",
            ranks("q, v", 1),
            ranks("q, v", 64),
            level=True,
        ),
        Statement(
            "and for all four",
            "74.1, 73.9; 91.2, 91.4",
            ranks("q, k, v, o", 1),
            ranks("q, k, v, o", 64),
            level=True,
        ),
        Statement("q alone needs more than rank 1", "70.5, 68.8; 91.1, 90.7", ranks("q", 4), ranks("q", 1)),
        Statement(
            "q and v do better than q, over the ranks", "73.5, 69.8; 91.3, 90.8", ranks("q, v"), ranks("q")
        ),
        Statement(
            "q and v at rank 1 do better than q at rank 64",
            "73.4, 70.0; 91.3, 90.7",
            ranks("q, v", 1),
            ranks("q", 64),
        ),
        Statement(
            "all four are level with q and v, over the ranks",
            "74.0, 73.5; 91.4, 91.3",
            ranks("q, k, v, o"),
            ranks("q, v"),
            level=True,
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
        Statement("LoRA is above full fine-tuning", "63.8, 60.2", ("LoRA",), ("FT",), size=100),
        Statement("they are level", "85.6, 85.8", ("LoRA",), ("FT",), level=True, size=1000),
        *(
            Statement(f"{one} is above {other}", paper, (one,), (other,), size=size)
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
        Statement(
            "LoRA with PreEmbed is level with LoRA (MNLI; above it on WikiSQL)",
            "75.0, 73.8; 91.4, 91.6",
            ("LoRA r=8 + PreEmbed 8+4",),
            ("LoRA r=8",),
            level=True,
        ),
        Statement(
            "LoRA with PreLayer is below LoRA",
            "73.8, 72.9; 91.6, 90.2",
            ("LoRA r=8",),
            ("LoRA r=8 + PreLayer 8+4",),
        ),
        Statement(
            "the longest PreEmbed is worse than a shorter one",
            "63.1, 55.9; 88.6, 85.8",
            PREFIXES[:1],
            PREFIXES[1:],
        ),
        Statement(
            "the longest PreLayer is worse than a shorter one",
            "70.1, 64.9; 89.5, 87.9",
            ("PreLayer 16+4",),
            ("PreLayer 64+4",),
        ),
        Statement(
            "LoRA hardly gains from rank 1 to 64",
            "73.4, 73.5; 91.3, 91.4",
            *((name,) for name in LORAS),
            level=True,
        ),
        Statement(
            "AdapterH gains from the smallest size on",
            "73.2, 71.9; 91.5, 89.8",
            ("AdapterH r=8",),
            ("AdapterH r=1",),
        ),
        Statement("LoRA is above AdapterH", "73.8, 73.2; 91.6, 91.5", ("LoRA r=8",), ("AdapterH r=8",)),
        Statement(
            "AdapterH is above PreLayer", "73.2, 70.1; 91.5, 89.5", ("AdapterH r=8",), ("PreLayer 16+4",)
        ),
        Statement(
            "PreLayer is above PreEmbed", "70.1, 63.1; 89.5, 88.6", ("PreLayer 16+4",), ("PreEmbed 32+4",)
        ),
    ),
)

PROMPT = {"prompt": "Review: {text}\nSentiment:", "words": ["negative", "positive"]}
TABLE_8 = Study(
    file="few-shot",
    title="The paper's table 8: prompting with examples, and training",
    decoder=True,
    cut={
        "recipe": {"training": {"epochs": 1, "batch_size": 16, "max_length": 64, "bf16": True}},
        "methods": {
            "no examples": {"few-shot": PROMPT},
            "2 of each class": {"few-shot": PROMPT},
            "FT": {"training": {"epochs": 3}},
            "LoRA": {
                "training": {"epochs": 3},
                "baseline": {
                    "method": "lora",
                    "r": 8,
                    "lora_alpha": 16,
                    "target_modules": ["q_proj", "v_proj"],
                },
            },
        },
        "seeds": [0],
    },
    tasks={
        "SST-2": {
            "data": {
                "train": "sst2/train.jsonl.gz",
                "test": "sst2/valid.jsonl.gz",
                "validation_fraction": 0.0003,
                "train_rows": 500,
                "test_rows": 200,
            }
        }
    },
    rates={"FT": [3e-5], "LoRA": [1e-3]},
    own={
        "caption": "The paper's: GPT-3, with two examples of each class (MNLI: six in all).",
        "columns": ["", "MNLI-m", "RTE"],
        "rows": [["few-shot", 40.6, 69.0], ["fine-tuned", 89.5, 85.4]],
    },
    statements=(
        Statement("training is above prompting", "89.5, 40.6; 85.4, 69.0", ("FT",), ("2 of each class",)),
        Statement("and so is LoRA", "91.7, 40.6 (tables 4 and 8)", ("LoRA",), ("2 of each class",)),
    ),
)

TABLE_18 = Study(
    file="decoder-ranks",
    title="The paper's table 18: ranks up to 1,024 on a decoder, and LoRA against full fine-tuning",
    decoder=True,
    cut={
        "recipe": {
            "training": {"batch_size": 4, "max_steps": 16, "eval_steps": 16, "bf16": True},
            "generation": {"num_beams": 1, "max_new_tokens": 40, "eval_rows": 1},
        },
        "tasks": {"E2E": {"data": {"train_rows": 400, "validation_rows": 4, "test_rows": 24}}},
        "seeds": [0],
    },
    methods=("FT", *(f"q, v r={r}" for r in (1, 4, 1024))),
    rates={"FT": [5e-5], "*": [1e-3]},
    own={
        "caption": "The paper's: GPT-2 medium, 1,024 wide, on E2E, 26,000 steps.",
        "columns": ["r", "1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024"],
        "rows": [
            ["validation loss", 1.23, 1.21, 1.18, 1.17, 1.16, 1.16, 1.16, 1.16, 1.16, 1.16, 1.17],
            ["BLEU", 68.72, 69.17, "**70.38**", 69.57, 69.61, 69.33, 69.24, 68.73, 68.92, 68.78, 69.37],
        ],
    },
    statements=(
        Statement("rank 4 has more BLEU than rank 1", "70.4, 68.7", ranks("q, v", 4), ranks("q, v", 1)),
        Statement("and than rank 1,024", "70.4, 69.4", ranks("q, v", 4), ranks("q, v", 1024)),
        Statement(
            "the loss falls from rank 1 to 4", "1.23, 1.18", ranks("q, v", 4), ranks("q, v", 1), metric="loss"
        ),
        Statement(
            "and hardly changes to rank 1,024",
            "1.18, 1.17",
            ranks("q, v", 4),
            ranks("q, v", 1024),
            level=True,
            metric="loss",
        ),
        Statement(
            "LoRA is above full fine-tuning in BLEU (table 3)", "70.4, 68.2", ranks("q, v", 4), ("FT",)
        ),
    ),
)

STUDIES = {"5": TABLE_5, "6": TABLE_6, "8": TABLE_8, "15": TABLE_15, "16": TABLE_16, "18": TABLE_18}
