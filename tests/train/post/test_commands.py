"""`lorica data`, `plan`, `init`, `evaluate`, `compare` and `tune` for post-training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from train import tiny
from train.post import small

import lorica
from lorica.cli import main
from lorica.errors import ConfigError
from lorica.train import Recipe
from lorica.train.plan import plan_recipe
from lorica.train.preview import preview

pytest.importorskip("trl", reason="needs TRL: pip install 'lorica[post]'")


def looked_at(decoder: Path, rows: list[dict[str, Any]], task: str, **post: Any) -> Any:
    recipe = small.recipe(decoder, Path("unused"), Path("unused"), task, post)
    return preview(recipe.replace(data={"validation_fraction": 0.0}), rows)


PAIRS = [
    {"prompt": "film", "chosen": " great song", "rejected": " dull"},
    {"prompt": "film", "chosen": " warm", "rejected": " dull"},
    {"prompt": "film", "chosen": " warm", "rejected": " dull"},
]


def test_pairs_are_shown_with_both_answers(decoder: Path) -> None:
    found = looked_at(decoder, PAIRS, "preference")
    train, first = found.splits["train"], found.first[0]
    assert (train.rows, train.duplicates, train.contradictions, train.targets) == (3, 1, 0, 13)
    assert first.marked() == "film⟦great song [SEP]⟧\n  instead of ⟦dull [SEP]⟧"
    assert (first.tokens, first.learned) == (7, 5)


def test_a_reward_model_learns_no_token(decoder: Path) -> None:
    found = looked_at(decoder, PAIRS, "reward")
    assert found.first[0].marked() == "film great song [SEP]\n  instead of film dull [SEP]"
    assert (found.first[0].tokens, found.first[0].learned, found.splits["train"].targets) == (7, 0, 0)


def test_judged_answers_are_shown_with_their_verdicts(decoder: Path) -> None:
    rows = [{"prompt": "film", "completion": " great", "label": good} for good in (True, False, True)]
    found = looked_at(decoder, rows, "preference")
    assert found.splits["train"].labels == {"wanted": 2, "not wanted": 1}
    assert [(each.marked(), each.answer) for each in found.first] == [
        ("film⟦great [SEP]⟧", "wanted"),
        ("film⟦great [SEP]⟧", "not wanted"),
    ]


def test_prompts_are_shown_without_a_reward(decoder: Path) -> None:
    found = looked_at(decoder, [{"prompt": "film song"}] * 2, "grpo", max_new_tokens=5)
    assert found.first[0].marked() == "film song"
    assert found.first[0].answer == "8 answers of up to 5 tokens, written in training"


def test_a_plan_counts_both_answers_and_the_reference(decoder: Path, rows: Path) -> None:
    def planned(task: str, **post: Any) -> Any:
        return plan_recipe(small.recipe(decoder, rows, Path("unused"), task, post))

    plain = plan_recipe(small.recipe(decoder, rows, Path("unused"), "causal-lm", training={"batch_size": 16}))
    pairs = planned("preference")
    assert (pairs.batch, pairs.activations, pairs.flops) == (16, plain.activations, plain.flops)
    assert pairs.weights == plain.weights + plain.gradients
    assert any("the reference is a copy of what trains" in line for line in pairs.assumptions)
    assert planned("preference", loss="simpo").weights == plain.weights
    scored = planned("reward")
    assert scored.batch == 16
    assert scored.parameters == plain.parameters - 32 * 32 + 2 * 32  # a head of one number, and its copy
    written = planned("grpo", max_new_tokens=8, generations=8)
    assert (written.batch, written.length) == (8, 64)  # all that the model reads
    assert written.weights == plain.weights
    assert planned("rloo").weights == plain.weights + plain.gradients


def test_the_largest_batch_is_one_of_whole_rows(decoder: Path, rows: Path) -> None:
    recipe = small.recipe(decoder, rows, Path("unused"), "preference")
    found = plan_recipe(recipe, gigabytes=0.01)
    assert found.batch % 2 == 0
    more = plan_recipe(recipe.replace(training={"batch_size": found.batch // 2 + 1}))
    assert found.memory <= 0.01e9 < more.memory
    least = plan_recipe(recipe.replace(training={"batch_size": 1}))
    with pytest.raises(ConfigError, match=r"not even one row fits .* preference reads 2 sequences of 64"):
        plan_recipe(recipe, gigabytes=(least.memory - least.gradients - 1000) / 1e9)


@pytest.mark.parametrize("task", ["preference", "reward", "grpo", "rloo"])
def test_a_recipe_of_questions_trains(
    task: str, decoder: Path, rows: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["-m", str(decoder), "-t", task, "-d", str(rows), "--method", "lora", "--size", "small"]
    assert main(["init", *given]) == 0
    hints = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert hints[0] == "next: lorica data recipe.yaml"
    short = ["--post.max_new_tokens", "3"]  # of the 64 tokens that this model reads
    assert main(["data", "recipe.yaml", *short]) == 0
    assert "training row 1" in capsys.readouterr().out
    assert main(["plan", "recipe.yaml", *short]) == 0
    recipe = Recipe.load("recipe.yaml")
    assert recipe.training.batch_size * recipe.training.gradient_accumulation % recipe.post.generations == 0
    train = hints[1].removeprefix("next: lorica ").split()
    if task in ("grpo", "rloo"):
        assert train[-2:] == ["--reward", "rewards.py:score"]
        Path("rewards.py").write_text(small.REWARD.replace("def good", "def score"))
        train += [*short, "--batch-size", "8", "--training.gradient_accumulation", "1"]
    assert main([*train, "--max-steps", "1", "--training.report_to", "[]"]) == 0
    assert lorica.read("runs/recipe").lora.r == 8


def test_a_run_is_evaluated_by_its_command(decoder: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = small.recipe(decoder, rows, tmp_path / "run", "preference", training={"max_steps": 1})
    lorica.train.train(recipe, console=Console(file=io.StringIO()))
    more = tiny.write_rows(tmp_path / "more.jsonl", small.pairs(4, seed=1))
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data.test", str(more), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 4
    assert {"loss", "margin", "accuracy"} <= found.keys()


COMPARISON: dict[str, Any] = {
    "tasks": {"film": {"task": "preference"}},
    "methods": {
        "lora": {"method": {"r": 2, "target_modules": "all-linear"}, "learning_rates": [1e-2, 1e-3]},
    },
    "seeds": [0],
    "split": "validation",
}


def compared(decoder: Path, rows: Path, tmp_path: Path, **methods: Any) -> Any:
    from lorica.compare import Comparison

    return Comparison.from_dict(
        {
            **COMPARISON,
            "methods": {**COMPARISON["methods"], **methods},
            "recipe": {
                "model": str(decoder),
                "data": {"train": str(rows), "validation_fraction": 0.2},
                "training": {"max_steps": 2, "batch_size": 8, "report_to": []},
            },
            "output": str(tmp_path / "compared"),
        }
    )


def test_methods_are_compared_on_preferences(decoder: Path, rows: Path, tmp_path: Path) -> None:
    from lorica.compare import compare

    spec = compared(decoder, rows, tmp_path, low={"method": {"r": 1, "target_modules": ["q_proj"]}})
    compare(spec, console=Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (tmp_path / "compared" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all("margin" in json.dumps(line) for line in lines)


def test_prompting_is_no_method_for_preferences(decoder: Path, rows: Path, tmp_path: Path) -> None:
    from lorica.compare.check import check

    with pytest.raises(ConfigError, match=r"few-shot is for .* not for preference"):
        check(compared(decoder, rows, tmp_path, prompted={"few-shot": {"shots": 1}}))


def test_a_search_keeps_the_run_with_the_larger_margin(decoder: Path, rows: Path, tmp_path: Path) -> None:
    from lorica.tune import SearchConfig, search

    recipe = small.recipe(decoder, rows, tmp_path / "unused", "preference", training={"max_steps": 4})
    found = search(
        recipe,
        {"training.learning_rate": {"choice": [1e-2, 1e-6]}},
        tmp_path / "search",
        SearchConfig(algorithm="grid", scheduler="none", engine="population", metric="margin"),
        console=Console(file=io.StringIO()),
    )
    assert found.best is not None
    assert found.best.values == {"training.learning_rate": 1e-2}
    assert all(record.status == "finished" for record in found.records)
    assert found.folder is not None
    assert lorica.read(found.folder).lora.r == 4
