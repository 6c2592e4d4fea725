"""Records of runs, searches and comparisons damaged at random: a LoricaError each, and no file is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz import damage

from lorica.compare.file import Comparison
from lorica.compare.results import Results
from lorica.errors import LoricaError
from lorica.train import Recipe
from lorica.train.record import Record
from lorica.train.trainer.checkpoints import STATE, check_state, find_best, is_complete
from lorica.tune import SearchConfig, Space
from lorica.tune.journal import Evaluation, Journal
from lorica.tune.progress import ranked, write_table
from lorica.tune.schedulers import Goal, scheduler_of
from lorica.tune.settings import reopen, settings

SPACE = {"method.r": {"choice": [1, 2, 4]}, "training.learning_rate": {"loguniform": [1e-3, 1e-2]}}


def test_recipes(tmp_path: Path) -> None:
    draw, whole, path = damage.generator("recipe"), Recipe().to_dict(), tmp_path / "recipe.yaml"
    for case in range(damage.CASES):
        harmed = damage.harmed(whole, draw)
        text = yaml.safe_dump(harmed, allow_unicode=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        path.write_bytes(damage.corrupted(text, draw) if draw.random() < 0.3 else text)
        damage.survives(lambda: Recipe.load(path).save(tmp_path / "again.yaml"), f"recipe {case}", path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\n"
        + "".join(f"b{i}: &b{i} [*b{i - 1 if i else ''}, *b{i - 1 if i else ''}]\n" for i in range(40)),
        "a: &a {x: 1}\nb: {<<: [" + ", ".join(["*a"] * 5000) + "]}",
        "a: &a [*a]",
        "task: &t {task: *t}",
        "[" * 50_000,
        "- " * 3000,
        "model: " + "9" * 5000,
        "model: 2001-99-99",
        "d: !!timestamp x",
        "model: !!python/object/apply:os.system [id]",
        "? [a, b]\n: 1",
        "model: !!binary x",
        "b: !!bool x",
        "s: !!int x",
    ],
    ids=range(14),
)
def test_yaml_made_to_harm(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    for load in (Recipe.load, Space.load, Comparison.load):
        with pytest.raises(LoricaError):
            load(tmp_path / "x.yaml")


def test_runs(tmp_path: Path) -> None:
    draw = damage.generator("run.json")
    rows = {"train": {"rows": 4, "sha256": "a", "skipped": 0}}
    machine = {"device": "cpu", "threads": 1, "instructions": "AVX2"}
    record = Record(Recipe(), rows, {"torch": "2"}, machine, {"trainable": 3, "metrics": {}}, "b")
    path = record.save(tmp_path)
    whole = json.loads(path.read_text())
    for case in range(damage.CASES):
        path.write_bytes(damage.as_text(damage.harmed(whole, draw), draw))

        def use() -> None:
            found = Record.load(path)
            found.differences()
            found.check_data({"train": {"rows": 5, "sha256": "c"}})
            with found.threads():
                pass

        damage.survives(use, f"run.json {case}", path)


def test_searches(tmp_path: Path) -> None:
    draw, path = damage.generator("search.json"), tmp_path / "search.json"
    whole = json.loads(settings(Recipe(), Space(SPACE), SearchConfig(resources={"cpu": 2})))
    for case in range(damage.CASES):
        path.write_bytes(damage.as_text(damage.harmed(whole, draw), draw))

        def use() -> None:
            recipe, space, config = reopen(tmp_path)
            space.check(recipe)
            scheduler_of(config, recipe)
            settings(recipe, space, config)

        damage.survives(use, f"search.json {case}", path)


def test_journals(tmp_path: Path) -> None:
    draw, path = damage.generator("journal"), tmp_path / "results.jsonl"
    journal = Journal(path)
    for i in range(3):
        journal.begin(f"00{i}", {"method.r": i})
        journal.evaluated(f"00{i}", Evaluation(1, 10, 1.0, {"accuracy": 0.5, "loss": 1.0}, 2.0))
        journal.ended(f"00{i}", "finished", metrics={"validation": {"accuracy": 0.5}})
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    for case in range(damage.CASES):
        lines = damage.harmed(whole, draw)
        text = (
            b"\n".join(damage.as_text(line, draw).replace(b"\n", b" ") for line in lines or [])
            if isinstance(lines, list)
            else b"x"
        )
        path.write_bytes(text + draw.choice((b"", b"\n", b"\n\n", b"\n{")))

        def use() -> None:
            records = list(Journal(path).records.values())
            goal = Goal("accuracy", "max")
            assert all("/" not in r.name and not r.name.startswith(".") for r in records)
            ranked(records, goal)
            write_table(records, tmp_path, goal)

        damage.survives(use, f"journal {case}", path)


@pytest.mark.parametrize("name", ["../x", "..", ".", "a/b", "/etc", "", ".hidden", 3, None, "a\\b", "a\x00"])
def test_a_trials_name_is_no_path(tmp_path: Path, name: Any) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps({"trial": name, "values": {}}) + "\n")
    with pytest.raises(LoricaError, match="is no line of a search"):
        Journal(tmp_path / "results.jsonl")


def test_results_of_comparisons(tmp_path: Path) -> None:
    draw, path = damage.generator("results"), tmp_path / "results.jsonl"
    row = {
        "key": "k",
        "task": "t",
        "method": "m",
        "scores": {"test": {"accuracy": 0.5}},
        "trainable": 3,
        "seed": 0,
    }
    for case in range(damage.CASES):
        path.write_bytes(
            damage.as_text(damage.harmed(row, draw), draw) + b"\n" + json.dumps(row).encode() + b"\n"
        )
        assert damage.survives(lambda: Results(path), f"results {case}", path)
        assert "k" in Results(path)


def test_comparisons(tmp_path: Path) -> None:
    draw, path = damage.generator("comparison"), tmp_path / "compare.yaml"
    whole = {
        "recipe": {"model": "x", "training": {"epochs": 1}},
        "tasks": {
            "one": {"task": "regression", "data": {"train": "x.csv"}, "metric": "loss", "also": ["pearson"]}
        },
        "methods": {
            "lora": {"method": {"r": 2}, "learning_rates": [1e-3, 1e-4]},
            "few": {"few-shot": {"shots": 1}},
        },
        "seeds": [0, 1],
        "sizes": ["all", 10],
        "output": str(tmp_path / "out"),
    }
    for case in range(damage.CASES):
        text = yaml.safe_dump(damage.harmed(whole, draw)).encode("utf-8", "surrogatepass")
        path.write_bytes(damage.corrupted(text, draw) if draw.random() < 0.3 else text)

        def use() -> None:
            spec = Comparison.load(path)
            for task in spec.tasks:
                for method in spec.methods:
                    spec.laid(task, method)

        damage.survives(use, f"comparison {case}", path)


def test_states_of_trainers(tmp_path: Path) -> None:
    from transformers import TrainerState

    draw, folder = damage.generator("state"), tmp_path / "checkpoint-10"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (folder / name).touch()
    fresh = dataclasses.asdict(TrainerState(global_step=10, max_steps=20, epoch=1.0, best_metric=0.5))
    callbacks = {"EarlyStoppingCallback": {"args": {}, "attributes": {"early_stopping_patience_counter": 1}}}
    whole: dict[str, Any] = {
        **fresh,
        "log_history": [{"step": 10, "loss": 1.0}],
        "stateful_callbacks": callbacks,
    }
    for case in range(damage.CASES):
        (folder / STATE).write_bytes(damage.as_text(damage.harmed(whole, draw), draw))

        def use() -> None:
            if is_complete(folder):
                check_state(folder)
                find_best(folder)
                TrainerState.load_from_json(str(folder / STATE))

        damage.survives(use, f"state {case}", folder)
