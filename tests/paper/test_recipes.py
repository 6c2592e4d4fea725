"""The recipes with the paper's own hyperparameters: they can be read, and train what the paper trains.

`docs/paper.md` shows the same table; `python tests/paper/test_recipes.py` prints it.
"""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from methods.test_counts import BASE, DEBERTA, LARGE, MEDIUM, ROBERTA_LARGE, Model

import lorica
from lorica.train import Recipe, plan, presets, tasks

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
# Tables 9, 10 and 11, task by task: batch, epochs, learning rate, longest input, weight decay.
PRINTED = {
    "roberta-base": {
        "mnli": (16, 30, 5e-4, 512, 0.1),
        "sst2": (16, 60, 5e-4, 512, 0.1),
        "mrpc": (16, 30, 4e-4, 512, 0.1),
        "cola": (32, 80, 4e-4, 512, 0.1),
        "qnli": (32, 25, 4e-4, 512, 0.1),
        "qqp": (16, 25, 5e-4, 512, 0.1),
        "rte": (32, 80, 5e-4, 512, 0.1),
        "stsb": (16, 40, 4e-4, 512, 0.1),
    },
    "roberta-large": {
        "mnli": (4, 10, 3e-4, 128, 0.1),
        "sst2": (4, 10, 4e-4, 128, 0.1),
        "mrpc": (4, 20, 3e-4, 512, 0.1),
        "cola": (4, 20, 2e-4, 128, 0.1),
        "qnli": (4, 10, 2e-4, 512, 0.1),
        "qqp": (4, 20, 3e-4, 512, 0.1),
        "rte": (8, 20, 4e-4, 512, 0.1),
        "stsb": (8, 30, 2e-4, 512, 0.1),
    },
    "deberta-xxl": {
        "mnli": (8, 5, 1e-4, 256, 0.0),
        "sst2": (8, 16, 6e-5, 128, 0.01),
        "mrpc": (32, 30, 2e-4, 128, 0.01),
        "cola": (4, 10, 1e-4, 64, 0.0),
        "qnli": (6, 8, 1e-4, 512, 0.01),
        "qqp": (8, 11, 1e-4, 320, 0.01),
        "rte": (4, 11, 2e-4, 320, 0.01),
        "stsb": (4, 10, 2e-4, 128, 0.1),
    },
}
WRITING = {"e2e": (0.01, 0.1, 0.9), "webnlg": (0.01, 0.1, 0.8), "dart": (0.0, 0.0, 0.8)}
"""Weight decay, dropout and label smoothing, length penalty (Table 11)."""
# What Tables 2 and 3 print as trained, in millions.
MILLIONS = {
    "roberta-base": "0.3",
    "roberta-large": "0.8",
    "deberta-xxl": "4.7",
    "gpt2-medium": "0.35",
    "gpt2-large": "0.77",
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "paper.md"


load = functools.cache(Recipe.load)


def steps(path: Path) -> int:
    """Of the whole training, the last batch of an epoch a smaller one."""
    training = load(path).training
    assert training.epochs is not None
    return math.ceil(ROWS[path.stem] / training.batch_size) * round(training.epochs)


def line(path: Path) -> str:
    """A recipe's row of the table in `docs/paper.md`."""
    recipe, folder = load(path), path.parent.name
    training, count = recipe.training, lora_parameters(MODELS[folder], recipe.method.r)
    cells = [
        f"`recipes/paper/{folder}/{path.name}`",
        f"{ROWS[path.stem]:,}",
        training.batch_size,
        f"{training.epochs:g}",
        f"{steps(path):,}",
        f"{round(training.warmup_ratio * steps(path)):,}",
        f"{training.learning_rate:.0e}".replace("e-0", "e-"),
        f"{count:,}",
        f"{MILLIONS[folder]}M",
    ]
    return f"| {' | '.join(map(str, cells))} |"


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
def test_hyperparameters_are_the_tables(path: Path) -> None:
    recipe, folder, task = load(path), path.parent.name, path.stem
    training = recipe.training
    got = (training.batch_size, training.epochs, training.learning_rate, training.max_length)
    if folder.startswith("gpt2"):
        decay, dropout, penalty = WRITING[task]
        assert got == (8, 5, 2e-4, 512)
        assert (recipe.method.r, recipe.method.lora_alpha) == (4, 32)
        assert (training.weight_decay, recipe.method.lora_dropout) == (decay, dropout)
        assert training.arguments.get("label_smoothing_factor", 0.0) == dropout
        generation = recipe.generation
        assert (generation.num_beams, generation.length_penalty) == (10, penalty)
        assert generation.no_repeat_ngram_size == 4
        assert training.warmup_ratio * steps(path) == pytest.approx(500, rel=0.05)
    else:
        assert (*got, training.weight_decay) == PRINTED[folder][task]
        assert training.warmup_ratio == (0.1 if folder.startswith("deberta") else 0.06)


def test_the_document_has_a_row_for_each() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    missing = [line(path) for path in RECIPES if line(path) not in text]
    assert not missing, "\n".join(missing)
    assert text.count("| `recipes/paper/") == len(RECIPES)


@pytest.mark.parametrize("folder", MODELS)
def test_a_step_can_be_planned_without_a_weight(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of `lorica plan`, of the model's published sizes; a block of each kind is enough for it."""
    few = {"num_hidden_layers": 1, "n_layer": 1}
    sizes: dict[str, Any] = {key: few.get(key, value) for key, value in MODELS[folder].config.items()}
    config = transformers.AutoConfig.for_model(**sizes)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **head: _with(config, head))
    for path in sorted((PAPER / folder).glob("*.yaml")):
        recipe = load(path)
        found = plan.plan_recipe(recipe)
        assert (found.batch, found.length) == (recipe.training.batch_size, recipe.training.max_length)
        one = lora_parameters(MODELS[folder]._replace(L=1), recipe.method.r)
        assert found.trainable == one + head_parameters(folder, path.stem)


def _with(config: Any, head: dict[str, Any]) -> Any:
    config = copy.deepcopy(config)
    for name, value in head.items():
        if name != "trust_remote_code":
            setattr(config, name, value)
    return config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_starts_from_mnli_names_a_run_that_a_recipe_makes(path: Path) -> None:
    start = load(path).init_from
    assert (start is not None) == (path.stem in ("mrpc", "rte", "stsb"))
    if start is not None:
        assert start == load(path.with_name("mnli.yaml")).output


if __name__ == "__main__":
    print("\n".join(map(line, RECIPES)))
