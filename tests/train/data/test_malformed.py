"""What users' files get wrong: refused by file, row and column before training, and nothing is written."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from PIL import Image
from train import tiny
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from lorica.errors import LoricaError
from lorica.train import Recipe, run, train

CLASSES, MULTI, NUMBERS = "sequence-classification", "multi-label-classification", "regression"
WORDS, IMAGES, ANSWERS = "token-classification", "image-classification", "question-answering"
LANGUAGE, SEQUENCES = "causal-lm", "seq2seq-lm"


class Case(NamedTuple):
    """A malformed input.

    `files` are written beside one another; `data` are the recipe's, its paths relative to them. In `message`,
    FILE stands for the path of the first of them.
    """

    task: str
    files: Mapping[str, Any]
    message: str
    data: Mapping[str, Any] = {}
    tokenizer: str | None = None


def rows(*values: Any, columns: Sequence[str] = ("text", "label")) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in values]


def labelled(*values: Any, **more: list[Any]) -> list[dict[str, Any]]:
    return [
        {"text": "film", "label": value, **{name: column[i] for name, column in more.items()}}
        for i, value in enumerate(values)
    ]


def scored(*values: Any) -> list[dict[str, Any]]:
    return [{"text": "film", "score": value} for value in values]


def tagged(*values: Any) -> list[dict[str, Any]]:
    return rows(*values, columns=("tokens", "tags"))


def asked(*values: Any) -> list[dict[str, Any]]:
    return rows(*values, columns=("question", "context", "answers"))


def answer(text: str, start: int) -> dict[str, Any]:
    return {"text": [text], "answer_start": [start]}


GOOD = labelled("a", "b", "a", "b")
FINE = asked(("film", "great film", answer("great", 0)), ("song", "dull song", answer("song", 5)))

CASES: dict[str, Case] = {
    # Files that cannot be read.
    "no file": Case(CLASSES, {}, r"no file or folder .*rows\.csv", {"train": "rows.csv"}),
    "a misspelt file": Case(CLASSES, {"rows.csv": GOOD}, "did you mean FILE", {"train": "rosw.csv"}),
    "a format by no name": Case(CLASSES, {"rows.pages": b"x"}, "cannot tell the format of FILE"),
    "broken JSON": Case(CLASSES, {"rows.jsonl": b'{"text": '}, "cannot read FILE as json"),
    "a csv row with a cell too many": Case(
        CLASSES,
        {"rows.csv": b"text,label\nfilm,a\nfilm,b,c\n"},
        r"row 2 of FILE has 3 cells, where there are 2 columns: text, label.*\(line 3\)",
    ),
    "bytes that are no text": Case(
        CLASSES,
        {"rows.csv": b"text,label\nf\x00lm,a\n"},
        "cannot read FILE as text: line 2 holds a zero byte",
    ),
    "a broken parquet file": Case(CLASSES, {"rows.parquet": b"no"}, "cannot read FILE as parquet"),
    "a gz that is none": Case(CLASSES, {"rows.jsonl.gz": b"no"}, "cannot read FILE as json"),
    "a gz cut short": Case(
        CLASSES,
        {"rows.jsonl.gz": gzip.compress(b'{"text": "film", "label": "a"}\n' * 999)[:40]},
        "cannot read FILE",
    ),
    "no rows": Case(CLASSES, {"rows.csv": b"text,label\n"}, "FILE has no rows"),
    "an empty file": Case(CLASSES, {"rows.jsonl": b""}, "FILE"),
    "a folder of nothing": Case(
        CLASSES, {"notes.md": b"x"}, "must hold train.csv.* no file of rows", {"train": "."}
    ),
    "a folder without training rows": Case(
        CLASSES, {"test.jsonl": GOOD}, "has no train split; it has: test", {"train": "."}
    ),
    "validation rows that are none": Case(
        CLASSES,
        {"rows.jsonl": GOOD, "dev.csv": b"text,label\n"},
        r"dev\.csv has no rows",
        {"validation": "dev.csv"},
    ),
    "one row": Case(
        CLASSES, {"rows.jsonl": GOOD[:1]}, "FILE has 1 row, too few", {"validation_fraction": 0.1}
    ),
    "fewer rows than are asked for": Case(
        CLASSES, {"rows.jsonl": GOOD}, "train_rows is 9, of 4 training rows in FILE", {"train_rows": 9}
    ),
    # Columns that are not there.
    "a misspelt column": Case(
        CLASSES, {"rows.jsonl": GOOD}, "FILE: there is no column 'txt' .*did you mean 'text'", {"text": "txt"}
    ),
    "no telling which is the text": Case(
        CLASSES, {"rows.csv": b"a,b,label\nfilm,song,x\n"}, "FILE: cannot tell which column holds the text"
    ),
    "no telling which is the label": Case(
        CLASSES, {"rows.csv": b"text,mark\nfilm,x\n"}, "FILE: cannot tell which column holds the label"
    ),
    "test rows without the text": Case(
        CLASSES,
        {"rows.jsonl": GOOD, "test.csv": b"body,label\nfilm,a\n"},
        r"no column 'text' in .*test\.csv",
        {"test": "test.csv"},
    ),
    "validation rows without the label": Case(
        CLASSES,
        {"rows.jsonl": GOOD, "dev.csv": b"text,lable\nfilm,a\n"},
        r"no column 'label' in .*dev\.csv; did you mean 'lable'",
        {"validation": "dev.csv"},
    ),
    # Texts and labels that are none.
    "no text": Case(
        CLASSES,
        {"rows.jsonl": rows(("film", "a"), (None, "b"))},
        "row 2 of FILE has nothing in column 'text'",
    ),
    "a number for a text": Case(
        CLASSES,
        {"rows.jsonl": rows((3, "a"), (4, "b"))},
        "row 1 of FILE has 3 in column 'text', where a text",
        {"text": "text"},
    ),
    "no label": Case(
        CLASSES, {"rows.jsonl": labelled("a", "b", None)}, "row 3 of FILE has no label in column 'label'"
    ),
    "an empty label": Case(
        CLASSES, {"rows.csv": b"text,label\nfilm,a\nfilm,\n"}, "row 2 of FILE has no label in column 'label'"
    ),
    "a fraction for a class": Case(
        CLASSES, {"rows.jsonl": labelled(1.0, 0.5)}, "row 2 of FILE has the label 0.5 in column 'label'"
    ),
    "a list for a class": Case(
        CLASSES, {"rows.jsonl": labelled(["a"], ["b"])}, "row 1 of FILE has a list in column 'label'"
    ),
    "one class": Case(CLASSES, {"rows.jsonl": labelled("a", "a")}, "FILE: all labels in column 'label'"),
    "a class for each row": Case(
        CLASSES,
        {"rows.jsonl": labelled(*map(str, range(1100)))},
        "FILE: column 'label' .* 1100 different values",
    ),
    "a class that is not among those given": Case(
        CLASSES,
        {"rows.jsonl": labelled("a", "b", "c")},
        "row 3 of FILE has the label 'c' in column 'label'",
        {"labels": ["a", "b"]},
    ),
    "a class that only the test rows have": Case(
        CLASSES,
        {"rows.jsonl": GOOD, "test.jsonl": labelled("a", "new")},
        r"row 2 of .*test\.jsonl has the label 'new' in column 'label'",
        {"test": "test.jsonl"},
    ),
    "text for a number": Case(
        NUMBERS, {"rows.csv": b"text,score\nfilm,1\nfilm,two\n"}, "row 2 of FILE has 'two' in column 'score'"
    ),
    "no number": Case(
        NUMBERS, {"rows.jsonl": scored(1.0, None, 2.0)}, "row 2 of FILE has nothing in column 'score'"
    ),
    "not a number": Case(
        NUMBERS,
        {"rows.csv": b"text,score\nfilm,1\nfilm,nan\n"},
        "row 2 of FILE has .*nan.* in column 'score'",
    ),
    "one number": Case(
        NUMBERS,
        {"rows.jsonl": scored(1.0, 1.0)},
        "FILE: all training rows have the same number in column 'score'",
    ),
    "a name for a list of names": Case(
        MULTI,
        {"rows.jsonl": labelled("a", "b")},
        "row 1 of FILE has 'a' in column 'label', where a list is due",
    ),
    "a gap in a list of names": Case(
        MULTI, {"rows.jsonl": labelled(["a"], ["b", None])}, "row 2 of FILE has no label in column 'label'"
    ),
    "neither 0 nor 1": Case(
        MULTI,
        {"rows.jsonl": [{"text": "film", "x": 1, "y": 0}, {"text": "film", "x": 2, "y": 0}]},
        "row 2 of FILE has 2 in column 'x', where 0 or 1 is due",
        {"labels": ["x", "y"]},
    ),
    # Words, images, answers, language.
    "a text for a list of words": Case(
        WORDS,
        {"rows.jsonl": tagged(("film", ["x"]), ("song", ["y"]))},
        "row 1 of FILE has 'film' in column 'tokens'",
    ),
    "more labels than words": Case(
        WORDS,
        {"rows.jsonl": tagged((["film"], ["x"]), (["film"], ["x", "y"]))},
        "row 2 of FILE has 1 words in column 'tokens' and 2 labels in column 'tags'",
    ),
    "an image that does not decode": Case(
        IMAGES,
        {"rows.jsonl": rows(("ok.png", "x"), ("bad.png", "y"), columns=("image", "label")), "bad.png": b"no"},
        "row 2 of FILE has an image in column 'image' that cannot be read",
    ),
    "an image that is not there": Case(
        IMAGES,
        {"rows.jsonl": rows(("none.png", "x"), ("ok.png", "y"), columns=("image", "label"))},
        r"row 1 of FILE names an image in column 'image' \(none.png\) that is neither in",
    ),
    "no images": Case(IMAGES, {"rows.jsonl": GOOD}, "FILE: cannot tell which column holds the images"),
    "nothing to write": Case(
        SEQUENCES,
        {"rows.jsonl": rows(("film", "song"), ("film", None), columns=("source", "target"))},
        "row 2 of FILE has nothing in column 'target'",
    ),
    "no completion": Case(
        LANGUAGE,
        {"rows.jsonl": rows(("film", "song"), ("film", None), columns=("prompt", "completion"))},
        "row 2 of FILE has nothing in column 'completion'",
    ),
    "nobody answers": Case(
        LANGUAGE,
        {"rows.jsonl": [{"messages": [{"role": "user", "content": "film"}]}] * 2},
        "row 1 of FILE has no message of the role 'assistant'",
        tokenizer="chat",
    ),
    "no chat template": Case(
        LANGUAGE,
        {"rows.jsonl": [{"messages": [{"role": "assistant", "content": "film"}]}]},
        "has no chat template",
    ),
    "an answer that is not where it says": Case(
        ANSWERS,
        {"rows.jsonl": [*FINE, *asked(("film", "great film", answer("film", 5)))]},
        "row 3 of FILE has the answer 'film' at character 5 in column 'answers', where .*'context' has",
    ),
    "an answer without its place": Case(
        ANSWERS,
        {"rows.jsonl": asked(("film", "great film", {"text": ["film"], "answer_start": []}))},
        "row 1 of FILE has .* in column 'answers', where a list of answers",
    ),
    "no text to look in": Case(
        ANSWERS,
        {"rows.jsonl": [*FINE, *asked(("film", None, answer("film", 0)))]},
        "row 3 of FILE has nothing in column 'context'",
    ),
    "no token to pad with": Case(
        CLASSES, {"rows.jsonl": GOOD}, "neither a padding nor an end-of-text token", tokenizer="bare"
    ),
}


def write(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif name.endswith(".csv"):
            Dataset.from_list(content).to_csv(folder / name)
        else:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))


def model_for(case: Case, folder: Path, encoder: Path) -> Path:
    if case.task == IMAGES:
        small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=8)).save_pretrained(folder)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        return folder
    if case.task != LANGUAGE and case.tokenizer is None:
        return encoder
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None if case.tokenizer == "bare" else "[SEP]"
    tokenizer.pad_token = None if case.tokenizer == "bare" else "[PAD]"
    if case.tokenizer == "chat":
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    ).save_pretrained(folder)
    return folder


def test_there_are_forty() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_malformed(name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    folder, output = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    write(folder, case.files)
    if case.task == IMAGES:
        Image.new("RGB", (8, 8)).save(folder / "ok.png")
    first = next(iter(case.files), "rows.csv")
    data: dict[str, Any] = {"train": first, "validation_fraction": 0.0, **case.data}
    data.update({key: str(folder / data[key]) for key in ("train", "validation", "test") if key in data})
    recipe = tiny.recipe(model_for(case, tmp_path / "model", tiny_model), folder, output)
    recipe = recipe.replace(task=case.task, data=data)
    assert isinstance(recipe, Recipe)

    def started(*_: Any, **__: Any) -> Any:
        pytest.fail("training has started")

    monkeypatch.setattr(run, "fit", started)
    monkeypatch.chdir(folder)
    with pytest.raises(LoricaError, match=case.message.replace("FILE", re.escape(str(folder / first)))):
        train(recipe)
    assert not output.exists()
