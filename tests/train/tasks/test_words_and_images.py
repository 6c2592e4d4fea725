from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from train import tiny
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.trainer_utils import EvalPrediction

from lorica.cli import main
from lorica.errors import LoricaError
from lorica.train import DataConfig, evaluate, predict, tasks, train
from lorica.train.data.rows import RowError
from lorica.train.data.splits import Splits

TOKENS, IMAGES = "token-classification", "image-classification"


def encode(task: str, rows: dict[str, Any], *, limit: int = 16, reader: Any = None, **data: Any) -> Any:
    found = tasks.get(task)
    table = Dataset.from_dict(rows)
    config = found.resolve(Splits(table), DataConfig(**data))
    return found.encode(table, config, reader or tiny.tokenizer(), limit, "the training rows")


def test_the_first_token_of_each_word_bears_its_class() -> None:
    # "film-song" gives three tokens, of which the first is asked.
    encoded = encode(TOKENS, {"tokens": [["great", "film-song", "plot"]], "tags": [["O", "B", "O"]]})
    assert encoded.features["labels"] == [[-100, 1, 0, -100, -100, 1, -100]]
    assert encoded.features["first_tokens"] == [[[0, 1], [1, 2], [2, 5]]]


def test_words_are_scored_once_and_padding_never() -> None:
    rows = {"tokens": [["film-song", "plot"], ["film"]], "tags": [["y", "x"], ["y"]]}
    features = encode(TOKENS, rows).features
    assert features["first_tokens"] == [[[0, 1], [1, 4]], [[0, 1]]]
    logits = np.zeros((2, 6, 2))
    logits[0, 1, 1] = logits[0, 4, 0] = logits[1, 1, 0] = 1
    outcome = EvalPrediction(predictions=logits, label_ids=np.array([]))
    assert tasks.get(TOKENS).metrics(outcome, features)["accuracy"] == pytest.approx(2 / 3)


def test_words_past_the_length_have_no_class() -> None:
    rows = {"tokens": [["great", "film", "song"]], "tags": [["x", "y", "x"]]}
    encoded = encode(TOKENS, rows, limit=4)
    assert encoded.truncated == 1
    (said,) = tasks.get(TOKENS).read(np.zeros((1, 4, 2)), encoded.features, DataConfig(labels=["x", "y"]))
    assert said == {"labels": ["x", "x", None], "probabilities": [0.5, 0.5, None]}


def test_the_share_of_words_that_are_scored_stands_beside_the_scores() -> None:
    rows = {"tokens": [["great", "film", "song", "plot"]], "tags": [["x", "y", "x", "y"]]}
    for limit, read in ((4, {"words_read": 0.5}), (16, {})):
        features = encode(TOKENS, rows, limit=limit).features
        outcome = EvalPrediction(predictions=np.zeros((1, 6, 2)), label_ids=np.array([]))
        found = tasks.get(TOKENS).metrics(outcome, features)
        assert found["accuracy"] == 0.5
        assert {name: value for name, value in found.items() if name == "words_read"} == read


def test_words_from_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"tokens": words, "tags": ["PRAISE" if word in tiny.GOOD else "O" for word in words]}
        for words in (row["text"].split() for row in tiny.sentences(40))
    ]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tiny.recipe(tiny_model, data, tmp_path / "out", epochs=15, learning_rate=1e-2)
    result = train(recipe.replace(task=TOKENS))
    assert result.metrics["validation"]["accuracy"] > 0.9
    (said,) = predict(result.output, ["lovely film"])
    assert said["tokens"] == ["lovely", "film"]
    assert set(said["labels"]) <= {"PRAISE", "O"}
    assert len(said["probabilities"]) == 2


def write_images(folder: Path, count: int = 16) -> list[dict[str, Any]]:
    """Dark and light images, their paths and names."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    rows = []
    for i in range(count):
        pixels = draw.integers(0, 80, (16, 16, 3)) + 170 * (i % 2)
        path = folder / f"{i}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        rows.append({"image": str(path), "label": "light" if i % 2 else "dark"})
    return rows


def test_images_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit(tmp_path / "model")
    rows = write_images(tmp_path / "images")
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tiny.recipe(tmp_path / "model", data, tmp_path / "out", epochs=8)
    result = train(recipe.replace(task=IMAGES, data={"validation_fraction": 0.25}))
    shown = capsys.readouterr().out
    assert re.search(r"step 5/24  loss [\d.]+  [\d,]+ samples/s  ETA", shown)
    assert "tokens/s" not in shown
    state = json.loads((result.output / "checkpoints/checkpoint-24/trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert all(entry["samples_per_second"] > 0 and "tokens_per_second" not in entry for entry in logged)
    assert result.metrics["validation"]["accuracy"] == 1
    said = predict(result.output, [rows[0]["image"], rows[1]["image"]])
    assert [row["label"] for row in said] == ["dark", "light"]
    assert said[0]["image"] == rows[0]["image"]
    assert main(["predict", str(result.output), rows[1]["image"]]) == 0
    assert capsys.readouterr().out.startswith("light  ")
    merged = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "model"), str(result.output), "--output", str(merged)]) == 0
    assert [row["label"] for row in predict(merged, [rows[0]["image"]])] == ["dark"]


def vit(folder: Path) -> Path:
    """A tiny model of images on disk."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["rows.csv", "train.csv"])
def test_paths_of_images_are_relative_to_the_file_that_has_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit(tmp_path / "model")
    rows = [
        (f"images/{Path(row['image']).name}", row["label"]) for row in write_images(tmp_path / "data/images")
    ]
    file = tmp_path / "data" / name
    file.write_text("\n".join(["image,label", *map(",".join, rows)]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = file.parent if name == "train.csv" else file
    recipe = tiny.recipe(model, source, tmp_path / "out", epochs=1).replace(task=IMAGES)
    recipe = recipe.replace(data={"validation_fraction": 0.25})
    output = train(recipe).output
    assert evaluate(output, source)["loss"] > 0
    if name == "rows.csv":
        assert len(predict(output, file)) == 16
        (tmp_path / "data/list.txt").write_text("images/0.png\nimages/1.png")
        assert [row["image"] for row in predict(output, tmp_path / "data/list.txt")] == [
            "images/0.png",
            "images/1.png",
        ]
        monkeypatch.chdir(tmp_path / "data")
        assert len(predict(output, ["images/0.png"])) == 1
        file.rename(tmp_path / "rows.csv")  # then the working directory has them
        assert len(predict(output, tmp_path / "rows.csv")) == 16
        monkeypatch.chdir(tmp_path / "elsewhere")
        with pytest.raises(RowError, match=r"row 1 of .*\(images/0\.png\) that is neither in .*elsewhere"):
            train(recipe.replace(data={"train": str(tmp_path / "rows.csv")}, output=str(tmp_path / "new")))


def test_an_image_that_does_not_decode(tmp_path: Path) -> None:
    rows = write_images(tmp_path, 4)
    Path(rows[2]["image"]).write_bytes(b"no image")
    columns = {name: [row[name] for row in rows] for name in ("image", "label")}
    with pytest.raises(LoricaError, match=r"row 3 of .* has an image in column 'image' that cannot"):
        encode(IMAGES, columns)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (TOKENS, {"tokens": [["a"]], "tags": [["x", "y"]]}, "row 1 .* has 1 words .* and 2 labels"),
        (TOKENS, {"tokens": ["a"], "tags": [["x", "y"]]}, "row 1 .* where a list of words is due"),
        (TOKENS, {"tokens": [[]], "tags": [["x", "y"]]}, "where a list of words is due"),
        (TOKENS, {"tokens": [["a"]], "tags": [["x"]]}, "at least two classes"),
        (
            TOKENS,
            {"letters": [["a"]], "tags": [["x"]]},
            "which column holds the lists of words; name it with --data.text",
        ),
        (
            IMAGES,
            {"pixels": [1, 2], "label": ["x", "y"]},
            "which column holds the images; name it with --data.text",
        ),
    ],
)
def test_rows_that_do_not_fit(task: str, rows: Any, message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        encode(task, rows)
