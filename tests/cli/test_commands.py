"""Each command once, as a user would type it, one after the other on the same run."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from train import tiny
from transformers import AutoModelForSequenceClassification

import lorica
from lorica.cli import main
from lorica.compare import demo
from lorica.train import LoraTrainerMixin, Recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a run of `lorica train`."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data")
    assert main(["train", *flags(folder, folder / "run")]) == 0
    return folder


def flags(folder: Path, output: Path) -> list[str]:
    return [
        *(
            "--task",
            "sequence-classification",
            "--model",
            str(folder / "model"),
            "--data.train",
            str(folder / "data"),
        ),
        *(
            "--method.r",
            "4",
            "--training.learning_rate",
            "1e-2",
            "--training.epochs",
            "2",
            "--training.batch_size",
            "4",
        ),
        *("--training.report_to", "[]", "-o", str(output)),
    ]


def test_train_says_what_it_does(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags(place, tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "text → label (bad, good); 40 train, 12 validation, 12 test rows" in out
    assert "trainable params: " in out
    assert re.search(r"20 steps in \d+:\d\d", out)
    assert f"lorica evaluate {tmp_path / 'run'}" in out
    assert lorica.read(tmp_path / "run").lora.r == 4


def test_options_override_the_recipe(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(place / "run" / "recipe.yaml")
    argv = [
        "train",
        recipe,
        "--method.r",
        "2",
        "--training.max_steps",
        "2",
        "-o",
        str(tmp_path / "run"),
    ]
    assert main(argv) == 0
    assert lorica.read(tmp_path / "run").lora.r == 2
    assert main(["train", f"--config={recipe}", "--method.r", "0"]) == 1
    assert "r must be a whole number of at least 1, not 0" in capsys.readouterr().err


def test_a_bad_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("trainning: {}")
    for argv in ([str(tmp_path / "recipe.yaml")], ["--config", str(tmp_path / "recipe.yaml")]):
        assert main(["train", *argv]) == 1
        assert "unknown field 'trainning'; did you mean 'training'" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read the recipe" in capsys.readouterr().err


def test_ctrl_c_prints_how_to_resume(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    calls = 0

    def pressed(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return transformers.Trainer.training_step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainerMixin, "training_step", pressed, raising=False)
        assert main(["train", *flags(place, output)]) == 130
    err = capsys.readouterr().err
    command = f"lorica train {output / 'recipe.yaml'} --resume"
    assert f"resume with: {command}" in err
    assert main(command.split()[1:]) == 0
    same = (output / "adapter_model.safetensors").read_bytes() == (
        place / "run" / "adapter_model.safetensors"
    ).read_bytes()
    assert same


def test_evaluate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(place / "run")]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert (
        main(["evaluate", str(place / "run"), "--data.test", str(place / "data" / "train.jsonl"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["rows"] == 40


def test_predict(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(place / "run")
    assert main(["predict", run, "a lovely film"]) == 0
    label, probability = capsys.readouterr().out.split()
    assert label in ("good", "bad")
    assert 0.5 <= float(probability) <= 1
    assert main(["predict", run, "a lovely film", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == label
    assert main(["predict", run, str(place / "data" / "test.jsonl"), "-o", str(tmp_path / "said.jsonl")]) == 0
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 12
    assert main(["predict", run, str(tmp_path / "none.csv")]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert main(["predict", run, "a film", "-o", str(tmp_path / "no" / "folder.jsonl")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["predict", run, str(place / "data")]) == 1
    assert "data is a folder; give a file of rows" in capsys.readouterr().err
    (tmp_path / "notes.md").write_text("a lovely film")
    assert main(["predict", run, str(tmp_path / "notes.md")]) == 1
    assert "cannot tell the format" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("evaluate", "--predictions"), ("generate", "a film", "-o")])
def test_what_cannot_be_written_is_said_first(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    (tmp_path / "run").mkdir()
    Recipe().save(tmp_path / "run" / "recipe.yaml")  # without an adapter, which would be said next
    assert main([name, str(tmp_path / "run"), *options, str(tmp_path / "no" / "lines.jsonl")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_merge(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(place / "model"), str(place / "run"), "-o", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert "share of each update lost to rounding" in out
    assert "more layers that lost less" in out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not lorica.adapters(model)
    assert main(["evaluate", str(tmp_path / "merged")]) == 0
    assert (
        main(["merge", str(place / "model"), str(place / "run"), "-o", str(tmp_path / "m"), "--restart"]) == 2
    )
    assert "--restart belongs to --stream" in capsys.readouterr().err
    assert main(["merge", str(place / "model"), str(place / "run"), "-o", str(tmp_path / "merged")]) == 1


def test_info(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(place / "run")]) == 0
    out = capsys.readouterr().out
    assert "rank        4" in out
    assert "classifier.weight" in out
    assert main(["info", str(place / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    adapter = lorica.read(place / "run")
    for path, factors in adapter.factors.items():
        update = factors.scale * factors.B.double() @ factors.A.double()
        assert found["layers"][path]["norm"] == pytest.approx(float(torch.linalg.norm(update)), rel=1e-6)
        assert found["layers"][path]["shape"] == list(update.shape)
    assert found["parameters"] == sum(
        t.numel() for t in load_file(place / "run" / "adapter_model.safetensors").values()
    )


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []

    def run_demo(recipe: Recipe, console: Any) -> demo.Demo:
        asked.append(recipe)
        rows = [demo.Row(method, 0.875, 1234, 5_600_000, 0.25, 800_000_000, 9.0, 3) for method in demo.TITLES]
        return demo.Demo(rows, 1e-6, 9.0, True, ["lorica info runs/demo/adapter"])

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert (
        main(
            [
                "demo",
                "--data",
                "rows.csv",
                "--data.test",
                "t.csv",
                "--max_steps",
                "3",
                "-o",
                str(tmp_path),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert all(title in out for title in demo.TITLES.values())
    assert all(cell in out for cell in ("87.5%", "1,234", "5.6 MB", "0.250", "800.0 MB"))
    assert "the merged model has the base's module tree" in out
    assert "lorica info runs/demo/adapter" in out
    assert (asked[0].data.train, asked[0].data.test, asked[0].training.max_steps) == ("rows.csv", "t.csv", 3)
