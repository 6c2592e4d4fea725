from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console
from train import tiny
from tune.searches import SPACE, Make, silent

from lorica.cli import main
from lorica.errors import ConfigError, LoricaError
from lorica.train import Recipe, evaluate
from lorica.train.data import sources as reading
from lorica.train.trainer.arguments import LOWER_IS_BETTER, training_arguments
from lorica.tune import (
    Evaluation,
    Goal,
    Halving,
    Population,
    RampConfig,
    Record,
    SearchConfig,
    Space,
    ramp,
    reopen,
    search,
)
from lorica.tune.figures import write_figures
from lorica.tune.journal import Journal
from lorica.tune.schedulers import mode_of, scheduler_of
from lorica.tune.searching import _why_apart, best_of, longest, query_and_value
from lorica.tune.settings import in_order


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def config() -> SearchConfig:
    return SearchConfig(trials=4, slots=2, metric="loss", max_t=2)


def test_a_search_from_end_to_end(make_recipe: Make, tmp_path: Path, config: SearchConfig) -> None:
    recipe, output = make_recipe(batch_size=8), io.StringIO()
    found = search(recipe, SPACE, tmp_path / "s", config, console=Console(file=output, width=200))
    assert [record.name for record in found.records] == ["000", "001", "002", "003"]
    assert all(record.values["method.r"] in (1, 2, 4) for record in found.records)
    assert found.goal == Goal("loss", "min")
    finished = [record for record in found.records if record.status == "finished"]
    assert found.best is min(finished, key=lambda record: record.best("loss", "min"))
    # What is in best/ is that trial's own adapter, and can be used.
    assert found.folder is not None
    assert found.best is not None
    kept, own = (
        folder / "adapter_model.safetensors" for folder in (found.folder, trial(tmp_path, found.best))
    )
    assert kept.read_bytes() == own.read_bytes()
    made = Recipe.load(found.folder / "recipe.yaml")
    assert made.method.r == found.best.values["method.r"]
    assert made.method.lora_alpha == 2 * made.method.r
    assert made.output == str(found.folder)
    assert not (found.folder / "checkpoints").exists()
    test = found.best.metrics["test"]
    assert evaluate(found.folder)["accuracy"] == pytest.approx(test["accuracy"])
    # The table has every trial; the figures are there; the console says how it was done.
    with (tmp_path / "s" / "trials.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table[0]["trial"] == min(found.records, key=lambda record: record.best("loss", "min")).name
    assert {row["status"] for row in table} <= {"finished", "stopped"}
    figures = {path.name for path in (tmp_path / "s" / "figures").iterdir()}
    assert {"scores.png", "scores.svg", "coordinates.png", "ranks.svg"} <= figures
    assert "share one base in this process" in output.getvalue()
    # Again, to the letter.
    again = search(recipe, SPACE, tmp_path / "t", config, console=silent())
    assert [record.values for record in again.records] == [record.values for record in found.records]
    lines = [row.get("metrics") for row in rows(tmp_path / "s" / "results.jsonl")]
    assert [row.get("metrics") for row in rows(tmp_path / "t" / "results.jsonl")] == lines


def trial(directory: Path, record: Record | None) -> Path:
    assert record is not None
    return directory / "s" / "trials" / record.name


def test_a_search_is_resumed_as_it_was(make_recipe: Make, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs lorica[tune]")
    recipe = make_recipe(epochs=1, max_steps=2)
    config = SearchConfig(trials=3, algorithm="tpe", scheduler="none", small=True, time_budget=1e-9)
    none = search(recipe, SPACE, tmp_path / "s", config, console=silent())
    assert none.best is None
    with pytest.raises(LoricaError, match="holds a search already"):
        search(recipe, SPACE, tmp_path / "s", config, console=silent())
    other = SearchConfig(trials=3, algorithm="random", scheduler="none")
    with pytest.raises(ConfigError, match=r"search\.algorithm was 'tpe', now 'random'"):
        search(recipe, SPACE, tmp_path / "s", other, resume=True, console=silent())
    kept, space, before = reopen(tmp_path / "s")
    assert before == config
    done = search(
        kept,
        space,
        tmp_path / "s",
        SearchConfig(trials=3, algorithm="tpe", scheduler="none", small=True),
        resume=True,
        console=silent(),
    )
    assert [record.status for record in done.records] == ["finished"] * 3
    assert all(record.evaluations[0].metrics["parameters"] > 0 for record in done.records)
    with pytest.raises(LoricaError, match="holds no search"):
        reopen(tmp_path)


def test_a_search_goes_on_in_the_order_of_rows_that_it_began_in(make_recipe: Make, tmp_path: Path) -> None:
    open_to_choice = make_recipe().replace(task="causal-lm")
    there = tmp_path / "search.json"
    assert in_order(open_to_choice, there).training.group_by_length is False
    for begun in (True, False):
        made = open_to_choice.replace(training={"group_by_length": begun})
        there.write_text(json.dumps({"recipe": made.to_dict()}))
        assert in_order(open_to_choice, there) == made
        other = open_to_choice.replace(training={"group_by_length": not begun})
        assert in_order(other, there) == other  # which is then refused as another search


def test_values_that_do_not_go_together_fail_alone(make_recipe: Make, tmp_path: Path) -> None:
    space = {
        "method.r": {"choice": [1, 2]},
        "method.target_modules": {"choice": [["query"], ["nothing"]]},
        "training.eval_batch_size": {"tied": "4 // (2 * r - 3 + 1)"},
    }
    recipe = make_recipe(epochs=1, max_steps=1)
    with pytest.raises(ConfigError, match="has no value"):
        search(recipe, space, tmp_path / "refused", console=silent())
    assert not (tmp_path / "refused").exists()
    del space["training.eval_batch_size"]
    config = SearchConfig(algorithm="grid", scheduler="none")
    found = search(recipe, space, tmp_path / "s", config, console=silent())
    assert [record.status for record in found.records] == ["finished", "failed"] * 2
    assert "nothing" in (found.records[1].error or "")


@pytest.mark.parametrize("metric", sorted(LOWER_IS_BETTER))
def test_less_of_an_error_is_better(make_recipe: Make, metric: str) -> None:
    goal = Goal.of(make_recipe(metric_for_best=f"eval_{metric}"))
    assert goal == Goal(metric, "min")
    records = [
        Record(name, {}, "finished", [Evaluation(1, 1, 1.0, {metric: value}, 1.0)])
        for name, value in (("bad", 9.0), ("good", 0.1))
    ]
    assert best_of(records, goal) is records[1]
    assert mode_of("accuracy") == "max"


def test_a_preset_decides_as_in_training(make_recipe: Make, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"sentence1": "lovely film " + "fine " * (i % 4), "sentence2": "awful plot", "label": float(i % 5)}
        for i in range(24)
    ]
    path = str(tiny.write_rows(tmp_path / "rows.jsonl", rows))
    data = {"preset": "glue/stsb", "train": path, "validation": path}
    recipe = make_recipe(epochs=1).replace(data=data)
    config = SearchConfig(trials=1, scheduler="none")
    found = search(recipe, {"method.r": {"choice": [1]}}, tmp_path / "s", config, console=silent())
    assert found.goal == Goal("pearson", "max")
    assert found.folder is not None
    assert Recipe.load(found.folder / "recipe.yaml").task == "regression"
    rising = ramp(recipe, tmp_path / "ramp", RampConfig(limit=1), console=silent())
    assert (rising.goal, rising.r) == (found.goal, 1)
    ours = Population({"a": recipe, "b": recipe.replace(method={"r": 1})}, tmp_path / "p", console=silent())
    for record in ours.run():
        assert record.status == "finished", record.error
        saved = Recipe.load(ours.folder(record.name) / "recipe.yaml")
        assert (saved.task, saved.training.metric_for_best) == ("regression", "pearson")
        assert "pearson" in record.metrics["validation"]


def test_the_mode_reaches_the_trainer(make_recipe: Make, tmp_path: Path) -> None:
    """A metric of the user's own, of which the name does not say which way it goes."""
    for mode, greater in (("min", False), ("max", True)):
        made = Goal("wer", mode).into(make_recipe())
        assert training_arguments(made.training, tmp_path, "f1", validated=True).greater_is_better is greater
        assert Goal.of(made) == Goal("wer", mode)
    assert made.training.arguments == {}, "what the name says already is not written down"
    config = SearchConfig(trials=1, slots=1, metric="loss", mode="max", scheduler="none")
    recipe, space = make_recipe(epochs=3, load_best=False), {"method.r": {"choice": [2]}}
    found = search(recipe, space, tmp_path / "s", config, console=silent())
    assert found.best is not None
    assert found.best.best("loss", "min") < found.best.best("loss", "max")
    assert found.best.metrics["validation"]["loss"] == pytest.approx(found.best.best("loss", "max"))
    again = search(recipe, space, tmp_path / "s", config, resume=True, console=silent())
    assert again.goal == found.goal


def test_not_a_number_never_wins() -> None:
    def record(name: str, status: Any, *losses: float) -> Record:
        made = [Evaluation(i, i, 0.0, {"loss": loss}, 0.0) for i, loss in enumerate(losses, 1)]
        return Record(name, status=status, evaluations=made)

    records = [
        record("nan", "finished", math.nan),
        record("worse", "finished", 0.5, math.nan),
        record("stopped", "stopped", 0.1),
        record("none", "failed"),
    ]
    for mode in ("min", "max"):
        best = best_of(records, Goal("loss", mode))
        assert best is not None
        assert best.name == "worse"
    assert best_of([records[0], records[3]], Goal("loss", "min")) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "tep"}, "algorithm must be one of .* not 'tep'; did you mean 'tpe'"),
        ({"scheduler": "hyperband"}, "scheduler must be one of"),
        ({"trials": 0}, "trials must be at least 1, not 0"),
        ({"mode": "best"}, "mode must be one of"),
        ({"time_budget": 0}, "time_budget must be more than 0 seconds"),
        ({"small": True}, "which 'random' cannot use; take 'tpe'"),
    ],
)
def test_what_cannot_be_searched_with_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**values)


def test_rungs_reach_as_far_as_thelongest_trial(make_recipe: Make) -> None:
    from lorica.tune.samplers import make_sampler
    from lorica.tune.searching import longest, notes

    config, recipe = SearchConfig(trials=3, max_t=20), make_recipe(epochs=2)
    for epochs, most in ((8, 8), ({"choice": [3, 9]}, 9), ({"tied": "4*r"}, 16)):
        space = Space({**SPACE, "training.epochs": epochs})
        made = longest(recipe, space)
        assert made.training.epochs == most
        rule = scheduler_of(SearchConfig(), made)
        assert isinstance(rule, Halving)
        assert max(rule.rungs) < most <= 2 * max(rule.rungs) + 1
    # Steps that are counted decide, whatever epochs says; where only the rows would tell, there is no end.
    stepped = recipe.replace(training={"max_steps": 100, "eval_steps": 10})
    for made, most in ((stepped, 10), (recipe.replace(training={"max_steps": 100}), 100)):
        rule = scheduler_of(SearchConfig(), made)
        assert isinstance(rule, Halving)
        assert rule.max_t == most
    assert "max_t is 20, and a trial has 2 evaluations" in next(
        notes(recipe, make_sampler("random", Space(SPACE), 0), config)
    )
    grid = make_sampler("grid", Space({"method.r": {"choice": [1, 2, 4, 8]}}), 0)
    assert next(notes(recipe, grid, config)) == "the grid has 4 combinations; the first 3 are tried (trials)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reduction_factor": 1.0}, "reduction_factor must be more than 1, not 1"),
        ({"grace_period": 5, "max_t": 4}, "grace_period must be from 1 to max_t"),
        ({"grace_period": 0, "scheduler": "median"}, "grace_period must be at least 1, not 0"),
        ({"max_t": 0}, "max_t must be None or at least 1, not 0"),
        ({"engine": "ray"}, "ray"),
    ],
)
def test_a_rule_that_cannot_be_leaves_the_folder_free(
    make_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray.tune", None)
    with pytest.raises(LoricaError, match=message):
        search(make_recipe(), SPACE, tmp_path / "s", SearchConfig(**values), console=silent())
    assert not (tmp_path / "s").exists()


def test_no_validation_rows_are_refused(make_recipe: Make, tiny_data: Path, tmp_path: Path) -> None:
    rows = {"train": str(tiny_data / "train.jsonl"), "validation_fraction": 0.0}
    with pytest.raises(ConfigError, match="needs validation rows"):
        search(make_recipe().replace(data=rows), SPACE, tmp_path / "s", console=silent())


def test_validation_rows_may_lie_beside_the_training_rows(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the Hub, where no name tells."""
    rows = Dataset.from_list(tiny.sentences(24))
    splits = DatasetDict({"train": rows, "validation": rows})
    monkeypatch.setattr(reading, "_hub", lambda name, subset: splits)
    recipe = make_recipe(epochs=1, max_steps=1).replace(
        data={"train": "own/rows", "validation_fraction": 0.0}
    )
    config = SearchConfig(trials=1, scheduler="none")
    found = search(recipe, {"method.r": {"choice": [1]}}, tmp_path / "s", config, console=silent())
    assert found.best is not None


def test_what_a_space_fixes_counts_in_whether_trials_share_a_base(make_recipe: Make) -> None:
    for fields, reason in (
        ({"quantization": "nf4"}, "its base is quantized (nf4)"),
        ({"training.gradient_checkpointing": True}, "training.gradient_checkpointing changes how"),
        ({"data.train_rows": {"tied": "10*r"}}, "data.train_rows changes the base, the rows or"),
        ({"training.bf16": True, "training.epochs": {"tied": "r"}}, None),
    ):
        space = Space({**fields, "method.r": {"choice": [1, 2]}})
        found = _why_apart(longest(make_recipe(), space), space)
        assert (found or "").startswith(reason or "\n") or found is reason


def test_a_misspelt_metric_ends_the_search(make_recipe: Make, tmp_path: Path) -> None:
    config = SearchConfig(trials=5, slots=1, metric="acuracy", scheduler="none")
    recipe, space = make_recipe(epochs=1, max_steps=1), {"method.r": {"choice": [1, 2]}}
    for resume in (False, True):
        found = search(recipe, space, tmp_path / "s", config, resume=resume, console=silent())
        assert [record.status for record in found.records] == ["failed"]
        assert "no metric 'acuracy'; did you mean 'accuracy'" in (found.records[0].error or "")


def test_what_is_resumed_counts_from_the_start(make_recipe: Make, tmp_path: Path) -> None:
    """Though only one trial at a time has begun again."""
    journal = Journal(tmp_path / "results.jsonl")
    for i in range(4):
        journal.begin(f"{i:03d}", {})
        journal.evaluated(f"{i:03d}", Evaluation(1, 1, 1.0, {"accuracy": 0.1 * i}, 1.0))
    recipes = {name: make_recipe() for name in journal.records}
    for goal in (Goal("accuracy", "max"), None):
        rule = Halving(max_t=4)
        Population(recipes, tmp_path, scheduler=rule, goal=goal, console=silent())
        assert len(rule.rungs[1]) == 4


def test_not_a_number_is_null_in_the_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    journal.begin("a", {"method.r": 1})
    journal.evaluated("a", Evaluation(1, 1, 1.0, {"loss": math.nan, "perplexity": math.inf}, 1.0))
    journal.ended("a", "finished", metrics={"validation": {"loss": math.nan}})
    said = (tmp_path / "results.jsonl").read_text()
    assert '"loss": null, "perplexity": null' in said
    assert "NaN" not in said
    record = Journal(tmp_path / "results.jsonl").record("a")
    assert math.isnan(record.evaluations[0].metrics["loss"])
    assert math.isnan(record.metrics["validation"]["loss"])
    assert math.isnan(record.best("perplexity", "max"))
    assert math.isnan(journal.record("a").best("perplexity", "max")), "the same before and after"


def test_the_model_is_asked_for_its_projections(make_recipe: Make) -> None:
    assert query_and_value(make_recipe()) == ("query", "value")


def test_figures_without_much_to_draw(tmp_path: Path) -> None:
    space, goal = Space(SPACE), Goal("loss", "min")
    assert write_figures([Record("a")], space, goal, tmp_path) == []
    values = {"training.learning_rate": 1e-3, "method.r": 2}
    one = Record("a", values, "finished", [Evaluation(1, 1, 1.0, {"loss": 0.5}, 1.0)])
    assert write_figures([one], space, goal, tmp_path) == ["scores", "coordinates"]


def test_the_share_that_a_field_explains(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs lorica[tune]")
    records = [
        Record(
            str(i),
            {"training.learning_rate": 10 ** (-2 - i % 5), "method.r": (1, 2, 4)[i % 3]},
            "finished",
            [Evaluation(1, 1, 1.0, {"loss": float(i % 3)}, 1.0)],
        )
        for i in range(15)
    ]
    from lorica.tune.figures import importance

    shares = importance(records, Space(SPACE), Goal("loss", "min"))
    assert list(shares) == ["method.r", "training.learning_rate"]
    assert shares["method.r"] > 0.8


def test_the_command(make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, space = tmp_path / "recipe.yaml", tmp_path / "space.yaml"
    make_recipe(epochs=1, max_steps=1).save(recipe)
    space.write_text("method.r: {choice: [1, 2]}\n")
    out = str(tmp_path / "out")
    options = ["--space", str(space), "--algorithm", "grid", "--scheduler", "none", "--output", out]
    assert main(["tune", str(recipe), *options, "--trials", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 trials by accuracy" in said
    assert "its own adapter and recipe are in" in said
    assert main(["tune", "--resume", out]) == 0
    assert "1 trials by accuracy" in capsys.readouterr().out
    # What says how much there is to search may be other than before; nothing else is taken, or passed over.
    assert main(["tune", "--resume", out, "--trials", "2"]) == 0
    assert "2 trials by accuracy" in capsys.readouterr().out
    assert reopen(out)[2] == SearchConfig(trials=2, algorithm="grid", scheduler="none")
    for options, named in (
        ([str(recipe), "--resume", out], "recipe"),
        (["--resume", out, "--metric", "loss", "--output", "x"], "--metric, --output"),
        ([str(recipe), "--ramp", "--metric", "loss", "--space", "x"], "--metric, --space"),
        (["--ramp", "--resume", out], "--resume"),
        ([str(recipe), "--rank.gain", "0.1"], "--rank"),
    ):
        assert main(["tune", *options]) == 1
        assert f"leave out {named}\n" in capsys.readouterr().err
    space.write_text("method.rr: {choice: [1, 2]}\n")
    assert main(["tune", str(recipe), "--space", str(space), "--output", str(tmp_path / "x")]) == 1
    assert "did you mean 'method.r'" in capsys.readouterr().err
    assert main(["tune", str(recipe), "--ramp", "--rank.limit", "1", "--output", str(tmp_path / "ramp")]) == 0
    assert "take r=1" in capsys.readouterr().out
