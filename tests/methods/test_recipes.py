"""The paper's other methods through a recipe: trained, resumed, scored, asked, and described."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import transformer
from train import tiny

import lorica
from lorica.cli import main
from lorica.config import read_config
from lorica.train import Recipe, evaluate, last_checkpoint, open_run, predict, train

LORA = {"method": "lora", "r": 2, "target_modules": "all-linear"}
BASELINES: dict[str, dict[str, Any] | list[dict[str, Any]]] = {
    "full": {"method": "full"},
    "top": {"method": "top", "blocks": 1},
    "bitfit": {"method": "bitfit"},
    "adapter-h": {"method": "adapter-h", "bottleneck": 4},
    "adapter-l": {"method": "adapter-l", "bottleneck": 4},
    "adapter-p": {"method": "adapter-p", "bottleneck": 4},
    "adapter-d": {"method": "adapter-d", "bottleneck": 4, "dropped": 1},
    "pre-embed": {"method": "pre-embed", "prefix": 3, "infix": 2},
    "pre-layer": {"method": "pre-layer", "prefix": 3, "infix": 2},
    "lora + pre-embed": [LORA, {"method": "pre-embed", "prefix": 2}],
    "lora + pre-layer": [LORA, {"method": "pre-layer", "prefix": 2}],
    "lora + bitfit": [LORA, {"method": "bitfit"}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "rows")
    return folder


@pytest.mark.parametrize("name", BASELINES)
def test_from_a_recipe_to_an_answer(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = place / name.replace(" ", "")
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "save_steps": 2, "save_total_limit": 9}
    recipe = tiny.recipe(place / "model", place / "rows", output, **settings).replace(
        baseline=BASELINES[name]
    )
    result = train(recipe)
    assert result.steps == 5
    config = recipe.configuration()
    head = 2 * (32 + 1)
    task = {"task_type": "SEQ_CLS"}
    counted = lorica.count(config.replace(**task), {**_shape(place), "num_labels": 2}).trainable
    assert result.trainable == counted > head

    scores = evaluate(output)
    assert scores.pop("rows") == 12
    assert scores == pytest.approx(result.metrics["test"], abs=1e-6)
    assert {row["label"] for row in predict(output, ["lovely film", "grim plot"])} <= {"good", "bad"}

    written = (output / "adapter_model.safetensors").read_bytes()
    checkpoints = output / "checkpoints"
    for later in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(checkpoints / later)
    (output / "adapter_model.safetensors").unlink()
    first = last_checkpoint(checkpoints)
    assert first is not None
    assert first.name == "checkpoint-2"
    assert train(recipe, resume=True).steps == 5
    assert (output / "adapter_model.safetensors").read_bytes() == written

    capsys.readouterr()
    assert main(["info", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    given = BASELINES[name]
    methods = [part["method"] for part in (given if isinstance(given, list) else [given])]
    assert sorted(found["methods"]) == sorted(methods)
    assert found["parameters"] == result.trainable
    assert main(["info", str(output)]) == 0
    assert f"({found['class']})" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adapter-h", "adapter-d", "pre-embed", "lora + pre-layer", "full"])
def test_a_decoder_generates_with_what_a_recipe_trained(name: str, place: Path, tmp_path: Path) -> None:
    model = tmp_path / "gpt2"
    transformer("gpt2", n_positions=40).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in tiny.sentences(16)]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tiny.recipe(model, tmp_path / "rows.jsonl", tmp_path / "run", epochs=1)
    recipe = Recipe.from_dict({"task": "causal-lm", "baseline": BASELINES[name]}).replace(
        model=recipe.model, data=recipe.data, training=recipe.training, output=recipe.output
    )
    result = train(recipe)
    assert evaluate(tmp_path / "run", str(tmp_path / "rows.jsonl"))["loss"] > 0
    trained = open_run(result.output).model
    asked = tiny.tokenizer()("lovely film", return_tensors="pt", add_special_tokens=False)
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        made = trained.generate(input_ids=asked["input_ids"], **settings, pad_token_id=0)  # type: ignore[operator]
        assert made.shape == (1, 6)
        with lorica.disabled(trained):
            assert trained.generate(  # type: ignore[operator]
                input_ids=asked["input_ids"], **settings, pad_token_id=0
            ).shape == (1, 6)


def test_the_families_are_the_three_classes() -> None:
    families = {name: _family(given) for name, given in BASELINES.items()}
    assert {families[name] for name in ("full", "top", "bitfit")} == {"selective"}
    assert {family for name, family in families.items() if "adapter" in name or name[:4] == "pre-"} == {
        "additive"
    }
    assert families["lora + bitfit"] == "reparametrisation + selective"


def _family(given: Any) -> str:
    from lorica.config import as_config, family_of

    return family_of(
        as_config([read_config(part) for part in (given if isinstance(given, list) else [given])])
    )


def _shape(place: Path) -> dict[str, Any]:
    return json.loads((place / "model" / "config.json").read_text())
