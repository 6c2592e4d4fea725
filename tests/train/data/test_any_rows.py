"""Rows in every form, from the file to the score: what a run says of them, and what comes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from train import tiny
from train.tasks.test_language import decoder, tokenizer
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lorica.cli import main
from lorica.errors import LoricaError
from lorica.train import Recipe, RowError, evaluate, predict, train
from lorica.train.prepared import encode

IMAGES = "image-classification"


def test_tables_in_python(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    frame = pd.DataFrame(tiny.sentences(20))
    recipe = make_recipe(max_steps=2).replace(output=str(tmp_path / "frame"))
    of_frame = train(recipe, {"train": frame, "validation": frame[:4]})
    of_lists = train(
        recipe.replace(output=str(tmp_path / "lists")),
        {"train": tiny.sentences(20), "dev": tiny.sentences(4)},
    )
    assert of_frame.adapter_sha256 == of_lists.adapter_sha256
    scores = evaluate(of_frame.output, frame)
    assert scores["rows"] == 20
    assert evaluate(of_frame.output, tiny.sentences(20)) == scores
    texts = [row["text"] for row in tiny.sentences(20)]
    said = predict(of_frame.output, frame)
    assert said == predict(of_frame.output, frame.drop(columns="label").to_dict("list"))
    assert said == predict(of_frame.output, tiny.sentences(20)) == predict(of_frame.output, texts)


def test_a_spreadsheet_of_europe(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{i};{row['text']} café;{row['label']}" for i, row in enumerate(tiny.sentences(20))]
    lines[3] = lines[3].replace(";good", "; Good")
    path = tmp_path / "reviews.csv"
    path.write_bytes("\r\n".join(["Nr.;text;label", *lines, ";;"]).encode("cp1252"))
    recipe = tiny.recipe(tiny_model, path, tmp_path / "out", max_steps=1).replace(
        data={"labels": ["bad", "good"]}
    )
    result = train(recipe)
    told = [
        line.removeprefix(f"{path}: ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(f"{path}: ")
    ]
    assert told == [
        "it is no UTF-8, so it is read as cp1252 (line 2: 'café;bad'); name another with --data.encoding",
        "its cells are apart at ';'",
        "1 rows without a filled cell are left out",
        "labels in column 'label': ' Good' is read as 'good' (1 times)",
        "columns that are not read: Nr.",
    ]
    assert result.rows == {"train": 18, "validation": 2}
    assert main(["evaluate", str(result.output), "--data.test", str(path), "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["rows"] == 20
    assert "read as cp1252" in found.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.csv",
            "text,label\nfilm,a\n\n\nsong,\nplot,b\n",
            r"row 2 of FILE has no label in column 'label' \(line 5\)",
        ),
        (
            "rows.csv",
            'text,label\n"film\nsong",a\n ,b\nplot,b\n',
            r"row 2 of FILE has an empty text in column 'text' \(line 4\)",
        ),
        (
            "rows.jsonl",
            '{"text": "film", "label": "a"}\n\n{"text": ""\n',
            r"row 2 of FILE is no JSON: .* \(line 3\)",
        ),
        ("rows.csv", "text,label\nfilm,a\nsong\nplot,b\n", r"row 2 of FILE has 1 cell, .* \(line 3\)"),
        (
            "rows.csv",
            "text,label\nfilm,Pos\nsong,pos\n",
            r"FILE: the labels 'Pos' \(1 rows\) and 'pos' \(1 rows\)",
        ),
    ],
)
def test_what_is_refused_is_named_as_it_stands_in_the_file(
    name: str, content: str, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    recipe = tiny.recipe(tiny_model, path, tmp_path / "out").replace(data={"validation_fraction": 0.0})
    with pytest.raises(LoricaError, match=message.replace("FILE", re.escape(str(path)))):
        encode(recipe)


def test_broken_rows_are_left_out_if_that_is_wanted(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nfilm,a\nsong\nplot,b\n ,b\nscene,b,c\n")
    recipe = tiny.recipe(tiny_model, path, tmp_path / "out")
    found = encode(recipe.replace(data={"validation_fraction": 0.0, "skip_bad": True}))
    assert (len(found.splits["train"]), found.data["train"]["skipped"]) == (2, 3)
    assert "row 2 of" in found.data["train"]["first_skipped"]


@pytest.mark.parametrize("at", range(0, 40, 7))
def test_a_bad_row_keeps_its_number_whichever_part_it_is_drawn_into(
    at: int, tiny_model: Path, tmp_path: Path
) -> None:
    rows: list[Any] = tiny.sentences(40)
    rows[at] = {"text": "film", "label": None} if at % 2 else {"text": None, "label": "good"}
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RowError, match=rf"^row {at + 1} of {re.escape(str(path))} has .* \(line {at + 1}\)$"):
        encode(tiny.recipe(tiny_model, path, tmp_path / "out").replace(data={"validation_fraction": 0.4}))


def test_words_of_conll(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("-DOCSTART- O\n\n" + "great PRAISE\nfilm-song O\n\nplot O\n\n" * 5)
    recipe = tiny.recipe(tiny_model, path, tmp_path / "out").replace(
        task="token-classification", data={"validation_fraction": 0.0}
    )
    features = encode(recipe).splits["train"].features
    words = tiny.tokenizer().convert_ids_to_tokens
    assert words(features["input_ids"][0]) == ["[CLS]", "great", "film", "[UNK]", "song", "[SEP]"]
    assert features["labels"][:2] == [[-100, 1, 0, -100, -100, -100], [-100, 0, -100]]


def test_raw_text_of_a_txt_file(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "texts.txt"
    path.write_text("film story\r\n\r\ngreat\r\n")
    recipe = tiny.recipe(tmp_path / "model", path, tmp_path / "out").replace(
        task="causal-lm", data={"validation_fraction": 0.0}
    )
    found = encode(recipe)
    (ids,) = found.splits["train"].features["input_ids"]
    assert tokenizer().convert_ids_to_tokens(ids) == [
        "[CLS]",
        "film",
        "story",
        "[SEP]",
        "[CLS]",
        "great",
        "[SEP]",
    ]
    assert found.notes == [
        f"{path}: each of its lines is a text",
        f"{path}: its rows are raw text (text), of which every token is learned",
    ]


def test_squads_own_file(tiny_model: Path, tmp_path: Path) -> None:
    asked = {"id": "1", "question": "song", "answers": [{"text": "great film", "answer_start": 5}]}
    article = {
        "title": "t",
        "paragraphs": [{"context": "plot great film", "qas": [asked, {**asked, "id": "2"}]}],
    }
    path = tmp_path / "train-v1.1.json"
    path.write_text(json.dumps({"version": "1.1", "data": [article]}))
    recipe = tiny.recipe(tiny_model, path, tmp_path / "out").replace(
        task="question-answering", data={"validation_fraction": 0.0}
    )
    features = encode(recipe).splits["train"].features
    words = tiny.tokenizer().convert_ids_to_tokens(features["input_ids"][0])
    assert words[features["start_positions"][0] : features["end_positions"][0] + 1] == ["great", "film"]


def images(folder: Path, count: int = 3) -> Path:
    for name, shade in (("dark", 0), ("light", 255)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (shade, shade, shade)).save(folder / name / f"{number}.png")
    return folder


def test_folders_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=8)).save_pretrained(
        tmp_path / "model"
    )
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    data = images(tmp_path / "data")
    recipe = tiny.recipe(tmp_path / "model", data, tmp_path / "out", max_steps=1)
    recipe = recipe.replace(task=IMAGES, data={"validation_fraction": 0.0})
    output = train(recipe).output
    capsys.readouterr()
    assert main(["evaluate", str(output), "--data.test", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    assert main(["predict", str(output), str(data)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in said] == [
        str(data / c / f"{i}.png") for c in ("dark", "light") for i in range(3)
    ]
    assert {row["label"] for row in said} <= {"dark", "light"}
    assert [row["image"] for row in predict(output, data / "dark")] == [row["image"] for row in said[:3]]
    assert predict(output, [{"image": row["image"]} for row in said]) == said
    bad = data / "light" / "1.png"
    bad.write_bytes(b"no image")
    with pytest.raises(RowError, match=rf"row 5 of .* that cannot be read \({re.escape(str(bad))}\)"):
        encode(recipe)
    with pytest.raises(RowError, match=re.escape(str(bad))):
        predict(output, data)
