"""What `paper_tables.py` runs on the small decoder: the paper's tables 3, 4, 8, 13, 14 and 18."""

from __future__ import annotations

from paper_studies import Study, above, level, ranks

WRITTEN = {"batch_size": 4, "bf16": True, "eval_steps": 1000, "group_by_length": False}
GREEDY = {"num_beams": 1, "eval_rows": 1, "batch_size": 32}

TABLE_3 = Study(
    file="decoder-methods",
    title="The paper's table 3: its methods on E2E",
    decoder=True,
    cut={
        "recipe": {
            "training": {**WRITTEN, "max_steps": 24},
            "generation": {**GREEDY, "max_new_tokens": 48},
        },
        "tasks": {"E2E": {"data": {"train_rows": 400, "validation_rows": 1, "test_rows": 32}}},
        "seeds": [0],
    },
    only=("E2E",),
    methods=("LoRA, all linear", "FT", "LoRA", "AdapterH", "AdapterL", "FT-Top2", "PreLayer"),
    rates={
        "FT": [1e-4],
        "FT-Top2": [3e-4],
        "LoRA": [5e-3],
        "LoRA, all linear": [3e-3],
        "PreLayer": [1e-2],
        "*": [3e-3],
    },
    own={
        "caption": "The paper's: GPT-2 medium, 26,000 steps.",
        "columns": ["", "trainable", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"],
        "rows": [
            ["FT", "354.92M", 68.2, 8.62, 46.2, 71.0, 2.47],
            ["AdapterL", "0.37M", 66.3, 8.41, 45.0, 69.8, 2.40],
            ["AdapterL", "11.09M", 68.9, 8.71, 46.1, 71.3, 2.47],
            ["AdapterH", "11.09M", 67.3, 8.50, 46.0, 70.7, 2.44],
            ["FT-Top2", "25.19M", 68.1, 8.59, 46.0, 70.8, 2.41],
            ["PreLayer", "0.35M", 69.7, 8.81, 46.1, 71.4, 2.49],
            ["LoRA", "0.35M", "**70.4**", "**8.85**", "**46.8**", "**71.8**", "**2.53**"],
        ],
    },
    statements=(
        above("LoRA is above full fine-tuning", "70.4, 68.2", "LoRA", "FT"),
        above("above AdapterL of its size", "70.4, 66.3", "LoRA", "AdapterL"),
        above("above AdapterH", "70.4, 67.3", "LoRA", "AdapterH"),
        above("above the last two blocks", "70.4, 68.1", "LoRA", "FT-Top2"),
        level("and level with PreLayer", "70.4, 69.7", "LoRA", "PreLayer"),
        above("PreLayer is above full fine-tuning", "69.7, 68.2", "PreLayer", "FT"),
        above("full fine-tuning is above a small AdapterL", "68.2, 66.3", "FT", "AdapterL"),
    ),
)

TRIPLES = {
    "recipe": {
        "training": {**WRITTEN, "max_steps": 12},
        "generation": {**GREEDY, "max_new_tokens": 48},
    },
    "seeds": [0],
}
FEW_TRIPLES = {"data": {"train_rows": 400, "validation_rows": 1, "test_rows": 32}}
BEST = {"FT": [1e-4], "FT-Top2": [3e-4], "PreLayer": [1e-2], "*": [3e-3]}

TABLE_13 = Study(
    file="decoder-methods",
    title="The paper's table 13: its methods on DART",
    decoder=True,
    cut={**TRIPLES, "tasks": {"DART": {**FEW_TRIPLES, "training": {"max_steps": 10}}}},
    only=("DART",),
    methods=("FT", "LoRA", "LoRA, all linear", "AdapterL", "FT-Top2", "PreLayer"),
    rates=BEST,
    own={
        "caption": "The paper's: GPT-2 medium.",
        "columns": ["", "trainable", "BLEU", "METEOR", "TER"],
        "rows": [
            ["FT", "354M", 46.2, 0.39, 0.46],
            ["AdapterL", "0.37M", 42.4, 0.36, 0.48],
            ["AdapterL", "11M", 45.2, 0.38, 0.46],
            ["FT-Top2", "24M", 41.0, 0.34, 0.56],
            ["PreLayer", "0.35M", 46.4, 0.38, 0.46],
            ["LoRA", "0.35M", "**47.1**", 0.39, 0.46],
        ],
    },
    statements=(
        level("LoRA is level with full fine-tuning", "47.1, 46.2", "LoRA", "FT"),
        level("and with PreLayer", "47.1, 46.4", "LoRA", "PreLayer"),
        above("above AdapterL of its size", "47.1, 42.4", "LoRA", "AdapterL"),
        above("above the last two blocks", "47.1, 41.0", "LoRA", "FT-Top2"),
        above("full fine-tuning is above the last two blocks", "46.2, 41.0", "FT", "FT-Top2"),
    ),
)

TABLE_14 = Study(
    file="decoder-methods",
    title="The paper's table 14: its methods on WebNLG",
    decoder=True,
    cut={**TRIPLES, "tasks": {"WebNLG": FEW_TRIPLES}},
    only=("WebNLG",),
    methods=TABLE_13.methods,
    rates=BEST,
    own={
        "caption": "The paper's: GPT-2 medium, BLEU on categories that training has not, has, and on all.",
        "columns": ["", "trainable", "unseen", "seen", "all"],
        "rows": [
            ["FT", "354M", 27.7, "**64.2**", 46.5],
            ["AdapterL", "0.37M", 45.1, 54.5, 50.2],
            ["AdapterL", "11M", "**48.3**", 60.4, 54.9],
            ["FT-Top2", "24M", 18.9, 53.6, 36.0],
            ["PreLayer", "0.35M", 45.6, 62.9, 55.1],
            ["LoRA", "0.35M", 46.7, 62.1, "**55.3**"],
        ],
    },
    statements=(
        above("LoRA is above full fine-tuning on all", "55.3, 46.5", "LoRA", "FT"),
        level("level with PreLayer", "55.3, 55.1", "LoRA", "PreLayer"),
        above("above AdapterL of its size", "55.3, 50.2", "LoRA", "AdapterL"),
        above("above the last two blocks", "55.3, 36.0", "LoRA", "FT-Top2"),
        above("full fine-tuning is above the last two blocks", "46.5, 36.0", "FT", "FT-Top2"),
        above("and below AdapterL", "50.2, 46.5", "AdapterL", "FT"),
    ),
)

TABLE_4 = Study(
    file="decoder-tasks",
    title="The paper's table 4: its methods on WikiSQL and MNLI",
    decoder=True,
    apart=0.11,  # two standard errors of the difference of two shares, 10 % of 64 rows or 36 % of 150
    cut={
        "recipe": {
            "training": {**WRITTEN, "max_steps": 16},
            "generation": {**GREEDY, "max_new_tokens": 40},
        },
        "tasks": {
            "WikiSQL": {"data": {"train_rows": 400, "validation_rows": 1, "test_rows": 64}},
            "MNLI": {
                "data": {"train_rows": 800, "validation_rows": 3, "test_rows": 150},
                "training": {"batch_size": 8, "max_steps": 16},
            },
        },
        "seeds": [0],
    },
    rates={"FT": [1e-4], "PreEmbed": [3e-2], "PreLayer": [1e-2], "*": [3e-3]},
    own={
        "caption": "The paper's: GPT-3.",
        "columns": ["", "trainable", "WikiSQL", "MNLI-m", "SAMSum R1 / R2 / RL"],
        "rows": [
            ["FT", "175,255.8M", 73.8, 89.5, "52.0 / 28.0 / 44.5"],
            ["BitFit", "14.2M", 71.3, 91.0, "51.3 / 27.4 / 43.5"],
            ["PreEmbed", "3.2M", 63.1, 88.6, "48.3 / 24.2 / 40.5"],
            ["PreLayer", "20.2M", 70.1, 89.5, "50.8 / 27.3 / 43.5"],
            ["AdapterH", "7.1M", 71.9, 89.8, "53.0 / 28.9 / 44.8"],
            ["AdapterH", "40.1M", 73.2, 91.5, "53.2 / 29.0 / 45.1"],
            ["LoRA", "4.7M", 73.4, "**91.7**", "**53.8 / 29.8 / 45.9**"],
            ["LoRA", "37.7M", "**74.0**", 91.6, "53.4 / 29.2 / 45.1"],
        ],
    },
    statements=tuple(
        compared(f"{task}: LoRA is {word} {other}", paper, "LoRA", other, task=task)
        for task, other, compared, word, paper in (
            ("WikiSQL", "FT", level, "level with", "73.4, 73.8"),
            ("WikiSQL", "AdapterH", above, "above", "73.4, 71.9"),
            ("WikiSQL", "PreLayer", above, "above", "73.4, 70.1"),
            ("WikiSQL", "PreEmbed", above, "above", "73.4, 63.1"),
            ("MNLI", "FT", above, "above", "91.7, 89.5"),
            ("MNLI", "AdapterH", above, "above", "91.7, 89.8"),
            ("MNLI", "PreLayer", above, "above", "91.7, 89.5"),
            ("MNLI", "PreEmbed", above, "above", "91.7, 88.6"),
        )
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
        above("training is above prompting", "89.5, 40.6; 85.4, 69.0", "FT", "2 of each class"),
        above("and so is LoRA", "91.7, 40.6 (tables 4 and 8)", "LoRA", "2 of each class"),
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
        above("rank 4 has more BLEU than rank 1", "70.4, 68.7", ranks("q, v", 4), ranks("q, v", 1)),
        above("and than rank 1,024", "70.4, 69.4", ranks("q, v", 4), ranks("q, v", 1024)),
        above(
            "the loss falls from rank 1 to 4", "1.23, 1.18", ranks("q, v", 4), ranks("q, v", 1), metric="loss"
        ),
        level(
            "and hardly changes to rank 1,024",
            "1.18, 1.17",
            ranks("q, v", 4),
            ranks("q, v", 1024),
            metric="loss",
        ),
        above("LoRA is above full fine-tuning in BLEU (table 3)", "70.4, 68.2", ranks("q, v", 4), "FT"),
    ),
)

WRITING = {"3": TABLE_3, "4": TABLE_4, "8": TABLE_8, "13": TABLE_13, "14": TABLE_14, "18": TABLE_18}
