"""What `lorica data` says of rows: counts by hand, and rows as the model sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train import tiny
from train.tasks.test_language import TEMPLATE, decoder, tokenizer

from lorica.cli import main
from lorica.train import Recipe
from lorica.train.preview import preview


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    decoder().save_pretrained(folder)
    tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


def recipe(model: Path, **data: Any) -> Recipe:
    made = Recipe(task="causal-lm", model=str(model))
    return made.replace(data={"validation_fraction": 0.0, **data}, training={"max_length": 8})


def test_counts_of_prompts_and_completions(model: Path) -> None:
    rows = {
        "train": [
            {"prompt": "film", "completion": "great"},
            {"prompt": "film", "completion": "great"},
            {"prompt": "film", "completion": "dull"},
            {"prompt": "song cast plot", "completion": "warm cold light voice scene"},
        ],
        "validation": [{"prompt": "film", "completion": "warm"}, {"prompt": "song", "completion": "great"}],
    }
    found = preview(recipe(model), rows)
    train, validation = found.splits["train"], found.splits["validation"]
    assert (train.rows, train.duplicates, train.contradictions, train.cut) == (4, 1, 1, 1)
    assert train.lengths == {"least": 4, "median": 4, "95 %": 9, "most": 10}
    assert train.targets == 2 + 2 + 2 + 6
    assert (validation.rows, validation.in_training, validation.duplicates) == (2, 1, 0)
    first = found.first[0]
    assert (first.tokens, first.learned, first.marked()) == (4, 2, "[CLS] film⟦great [SEP]⟧")
    assert found.notes[0].endswith("its rows are prompts and completions (prompt → completion)")
    assert list(found.lines())[-2:] == [
        "train: 4 rows, 4 to 10 tokens a row (4 in the median, 95 % up to 9), 12 tokens learned, 1 cut to 8 "
        "(25.0%), 1 duplicates, 1 that read the same as another and are answered otherwise",
        "validation: 2 rows, 4 to 4 tokens a row (4 in the median, 95 % up to 4), 4 targets, 0 cut to 8, 0 "
        "duplicates, 1 that training rows hold too",
    ]


def test_what_the_assistant_says_is_marked(model: Path) -> None:
    says = [("user", "film"), ("assistant", "great"), ("user", "song"), ("assistant", "dull")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in says]}]
    (first,) = preview(recipe(model), rows).first
    assert first.marked() == "[UNK] film [UNK]⟦great⟧[UNK] song [UNK]⟦dull⟧"


def test_packed_rows_are_counted(model: Path) -> None:
    rows = [{"prompt": "film", "completion": "great"}] * 4
    packed = recipe(model).replace(training={"packing": True})
    assert preview(packed, rows).packing == (
        "4 training rows are packed into 2 sequences of up to 8 tokens, 2.0 rows a sequence; 0.0% of what "
        "the model reads is padding"
    )


def test_classes_on_the_command_line(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"film {word}", "label": "good"} for word in tiny.GOOD] + [
        {"text": "dull", "label": "bad"}
    ]
    tiny.write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "dull", "label": "good"}])
    given = ["-d", str(tmp_path / "rows.jsonl"), "-m", str(model), "--data.validation_fraction", "0"]
    assert main(["data", *given]) == 0
    out = capsys.readouterr().out
    assert "good 6 (86%), bad 1 (14%)" in out
    assert "training row 1: 4 tokens, → good\n[CLS] film lovely [SEP]\n" in out
    assert main(["data", *given, "--json", "--rows", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["splits"]["train"]["labels"] == {"bad": 1, "good": 6}
    assert len(told["first"]) == 1


def test_the_command_reads_a_recipe_and_names_what_is_wrong(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "film", "completion": "great"}] * 2)
    path = recipe(model, train=str(tmp_path / "rows.jsonl")).save(tmp_path / "recipe.yaml")
    assert main(["data", str(path)]) == 0
    assert "training row 2: 4 tokens, 2 learned\n[CLS] film⟦great [SEP]⟧" in capsys.readouterr().out
    assert main(["data", str(path), "--data.label", "answer"]) == 1
    assert "name the prompt too, with data.text" in capsys.readouterr().err


def test_of_rows_on_disk_the_first_are_looked_at(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"film {number}", "completion": "great"} for number in range(1200)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    found = preview(recipe(model, train=str(path), streaming=True))
    assert found.splits["train"].rows == 1000
    assert found.notes[0] == f"{path}: of 1,200 train rows on disk, the first 1,000"
