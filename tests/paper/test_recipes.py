"""The recipes with the paper's own hyperparameters: they can be read, and train what the paper trains."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
from methods.test_counts import BASE, DEBERTA, LARGE, MEDIUM, ROBERTA_LARGE, Model

import lorica
from lorica.train import Recipe, presets, tasks

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
RECIPES = sorted(PAPER.rglob("*.yaml"))
MODELS = {
    "roberta-base": BASE,
    "roberta-large": ROBERTA_LARGE,
    "deberta-xxl": DEBERTA,
    "gpt2-medium": MEDIUM,
    "gpt2-large": LARGE,
}
CLASSES = {"mnli": 3, "stsb": 1}
# Rows to train on, per task.
ROWS = {
    "mnli": 392_702,
    "sst2": 67_349,
    "mrpc": 3_668,
    "cola": 8_551,
    "qnli": 104_743,
    "qqp": 363_846,
    "rte": 2_490,
    "stsb": 5_749,
    "e2e": 42_061,
    "webnlg": 18_025,
    "dart": 62_659,
}


load = functools.cache(Recipe.load)


def lora_parameters(model: Model, r: int) -> int:
    """A and B of query and value; of GPT-2's fused layer r·(d + 3d), which is as many."""
    return model.L * 4 * r * model.d


def head_parameters(folder: str, task: str) -> int:
    """The head that a classifier trains whole."""
    d, classes = MODELS[folder].d, CLASSES.get(task, 2)
    out = d * classes + classes
    return 0 if folder.startswith("gpt2") else out if folder.startswith("deberta") else d * d + d + out


def test_there_is_one_for_each_model_and_task() -> None:
    made = {(path.parent.name, path.stem) for path in RECIPES}
    glue = [name for name in ROWS if name not in ("e2e", "webnlg", "dart")]
    assert made == {(m, t) for m in MODELS for t in (ROWS.keys() - glue if m.startswith("gpt2") else glue)}


@functools.cache
def counts() -> dict[tuple[str, int], int]:
    """What the recipes of a model train, by its number of classes (all that matters here)."""
    found: dict[tuple[str, int], int] = {}
    for path in RECIPES:
        recipe, key = presets.apply(load(path)), (path.parent.name, CLASSES.get(path.stem, 2))
        if key not in found:
            method = recipe.method.replace(task_type=tasks.get(recipe.task).task_type)
            config = MODELS[key[0]].config | {"num_labels": key[1]}
            found[key] = lorica.count(method, config).trainable
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_trains_what_the_paper_trains(path: Path) -> None:
    recipe = presets.apply(load(path))
    folder, task = path.parent.name, path.stem
    assert recipe.output == f"runs/paper/{folder}/{task}"
    first = load(path.with_name("e2e.yaml" if folder.startswith("gpt2") else "mnli.yaml")).method
    assert recipe.method.replace(lora_dropout=0.0) == first.replace(lora_dropout=0.0)
    trained, r = counts()[folder, CLASSES.get(task, 2)], recipe.method.r
    assert trained == lora_parameters(MODELS[folder], r) + head_parameters(folder, task)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_warm_up_and_steps(path: Path) -> None:
    recipe = load(path)
    assert recipe.training.epochs is not None
    steps = math.ceil(ROWS[path.stem] / recipe.training.batch_size) * recipe.training.epochs
    if path.parent.name.startswith("gpt2"):
        assert round(recipe.training.warmup_ratio * steps) == pytest.approx(500, rel=0.05)
    else:
        assert recipe.training.warmup_ratio == (0.1 if path.parent.name.startswith("deberta") else 0.06)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_starts_from_mnli_names_a_run_that_a_recipe_makes(path: Path) -> None:
    start = load(path).init_from
    assert (start is not None) == (path.stem in ("mrpc", "rte", "stsb"))
    if start is not None:
        assert start == load(path.with_name("mnli.yaml")).output
