"""Trained together is trained alone: the judge is `lorica.train.train` of each recipe by itself."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from train import tiny
from transformers import GPT2Config, GPT2LMHeadModel

from lorica import LoraConfig
from lorica.errors import ConfigError, LoricaError
from lorica.train import DataConfig, Recipe, TrainingConfig, train
from lorica.tune import Goal, Halving, Population, Record
from lorica.tune.population import joint_layers, population, shared_base

Make = Callable[..., Recipe]


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_as_alone(
    recipes: dict[str, Recipe], found: Population, folder: Path, within: float = 1e-6
) -> None:
    """The same adapters, heads included, scores and evaluations as of each recipe trained by itself."""
    for name, recipe in recipes.items():
        result = train(recipe.replace(output=str(folder / name)), console=silent())
        record = found.journal.record(name)
        assert record.status == "finished", record.error
        for split, scores in result.metrics.items():
            assert record.metrics[split] == pytest.approx(scores, abs=within)
        theirs, ours = weights(result.output), weights(found.folder(name))
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, atol=within, rtol=within)


def unlike(recipe: Recipe) -> dict[str, Recipe]:
    """Recipes that differ in all that can differ."""
    return {
        "plain": recipe,
        "seed": recipe.replace(method={"r": 4}, training={"seed": 3, "learning_rate": 3e-3}),
        "targets": recipe.replace(
            method={"target_modules": ["query", "value"], "lora_dropout": 0.0, "lora_alpha": 32},
            training={"weight_decay": 0.1, "max_grad_norm": 0.05, "batch_size": 8, "epochs": 1},
        ),
        "accumulates": recipe.replace(
            method={"r": 1, "lora_dropout": 0.4},
            training={"gradient_accumulation": 3, "lr_scheduler": "cosine", "eval_steps": 2, "epochs": 1},
        ),
    }


def test_equal_to_training_each_alone(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.unfreeze()
    recipes, sizes, frozen = unlike(make_recipe(epochs=1)), [], gc.get_freeze_count()
    original = joint_layers.joint_linear

    def counted(segments: Any, weight: Any, bias: Any) -> Any:
        sizes.append(len(segments))
        return original(segments, weight, bias)

    monkeypatch.setattr(joint_layers, "joint_linear", counted)
    found = Population(recipes, tmp_path / "population", console=silent())
    found.run()
    assert sizes.count(4) > 13 * 3, "the layers were not computed together"
    assert gc.get_freeze_count() == frozen, "the garbage collector is not as it was"
    assert_as_alone(recipes, found, tmp_path / "alone")


def test_autocast_to_bfloat16_is_joint_too(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, dtypes = unlike(make_recipe(epochs=1, bf16=True)), set()
    original = joint_layers.joint_linear

    def seen(segments: Any, weight: Any, bias: Any) -> Any:
        dtypes.add((len(segments), segments[0].x.dtype, weight.dtype))
        return original(segments, weight, bias)

    monkeypatch.setattr(joint_layers, "joint_linear", seen)
    found = Population(recipes, tmp_path / "population", console=silent())
    found.run()
    assert (4, torch.bfloat16, torch.bfloat16) in dtypes
    assert {dtype for _, *pair in dtypes for dtype in pair} == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")
    assert_as_alone(recipes, found, tmp_path / "alone", within=1e-4)


def test_other_methods_and_starts_share_what_they_leave_alone(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(epochs=1, max_steps=3)
    recipes = {
        "dora": recipe.replace(method={"use_dora": True}),
        "pissa": recipe.replace(method={"init_lora_weights": "pissa", "r": 4}),
        "bitfit": recipe.replace(baseline={"method": "bitfit"}),
        "plus": recipe.replace(training={"loraplus_lr_ratio": 4.0}),
        "corda": recipe.replace(method={"init_lora_weights": "corda"}, training={"start_batches": 2}),
    }
    found = Population(recipes, tmp_path / "population", console=silent())
    found.run()
    assert_as_alone(recipes, found, tmp_path / "alone")


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    tokenizer = tiny.tokenizer()
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_causal_language_models(language_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        task="causal-lm",
        model=str(language_model),
        data=DataConfig(train=str(tiny_data), text="text", label="label"),
        method=LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True),
        training=TrainingConfig(epochs=1, batch_size=4, learning_rate=1e-2, report_to=[], max_steps=5),
    )
    recipes = {"a": recipe, "b": recipe.replace(method={"r": 4}, training={"chunked_loss": False, "seed": 1})}
    found = Population(recipes, tmp_path / "population", console=silent())
    found.run()
    assert_as_alone(recipes, found, tmp_path / "alone")


def test_the_base_is_not_written_to(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[torch.nn.Module] = []
    original = shared_base.load_model

    def kept(*args: Any) -> Any:
        bases.append(original(*args))
        return bases[-1]

    def digest(model: torch.nn.Module) -> str:
        parts = [tensor.detach().numpy().tobytes() for _, tensor in model.state_dict().items()]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    monkeypatch.setattr(shared_base, "load_model", kept)
    recipe = make_recipe(epochs=1, max_steps=2)
    recipes = [recipe, recipe.replace(method={"r": 4}), recipe.replace(training={"seed": 1})]
    before: list[str] = []
    original_copy = shared_base.shared_copy

    def copied(model: Any) -> Any:
        before.append(digest(model))
        return original_copy(model)

    monkeypatch.setattr(shared_base, "shared_copy", copied)
    records = Population(recipes, tmp_path / "population", console=silent()).run()
    assert [record.status for record in records] == ["finished"] * 3
    assert len(bases) == 2, "one for each seed of the head"
    assert [digest(each) for each in bases] == [before[0], before[2]]
    pairs = zip(bases[0].named_parameters(), bases[1].parameters(), strict=True)
    apart = {name for (name, one), other in pairs if one is not other}
    assert apart == {"classifier.weight"}, "the bases share all but the head's new weights"


def test_losers_leave_and_those_who_wait_take_their_place(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(epochs=4, batch_size=8)
    recipes = {
        f"{rate:g}": recipe.replace(training={"learning_rate": rate, "seed": i})
        for i, rate in enumerate((3e-2, 1e-9, 2e-2, 1e-8, 1e-2))
    }
    rule = Halving(grace_period=1, reduction_factor=2, max_t=4)
    goal, output = Goal("loss", "min"), io.StringIO()
    found = Population(
        recipes, tmp_path / "p", slots=2, scheduler=rule, goal=goal, console=Console(file=output, width=200)
    )
    records = {record.name: record for record in found.run()}
    stopped = {name for name, record in records.items() if record.status == "stopped"}
    assert stopped
    assert {record.status for record in records.values()} == {"stopped", "finished"}
    # By hand, from the file alone, in the order of its lines.
    hand = Halving(grace_period=1, reduction_factor=2, max_t=4)
    rows = [json.loads(line) for line in (tmp_path / "p" / "results.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "time" in row]
    assert [hand.stops(row["trial"], row["time"], -row["metrics"]["loss"]) for row in evaluations] == [
        row["stops"] for row in evaluations
    ]
    assert {row["trial"] for row in evaluations if row["stops"]} == stopped
    for name, record in records.items():
        assert (found.folder(name) / "adapter_model.safetensors").is_file() == (record.status == "finished")
    assert "stopped" in output.getvalue()


def test_a_failing_trial_is_shown_and_harms_no_other(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(epochs=1)
    recipes = {
        "target": recipe.replace(method={"target_modules": ["nothing"]}),
        "later": recipe.replace(training={"seed": 7}),
        "good": recipe,
    }
    original, output = population.JointTrainer.training_step, io.StringIO()

    def fails(self: Any, *args: Any, **options: Any) -> Any:
        loss = original(self, *args, **options)
        if self.args.seed == 7 and self.state.global_step == 3:
            raise RuntimeError("out of luck")
        return loss

    monkeypatch.setattr(population.JointTrainer, "training_step", fails)
    console = Console(file=output, width=200)
    records = {r.name: r for r in Population(recipes, tmp_path / "p", console=console).run()}
    assert {name: record.status for name, record in records.items()} == {
        "target": "failed",
        "later": "failed",
        "good": "finished",
    }
    assert (records["later"].error or "") == "RuntimeError: out of luck"
    assert "TargetError" in (records["target"].error or "")
    assert "out of luck" in output.getvalue()
    assert "Traceback" in (tmp_path / "p" / "trials" / "later" / "log.txt").read_text()
    alone = train(recipe.replace(output=str(tmp_path / "alone")), console=silent())
    assert records["good"].metrics == alone.metrics


def test_what_cannot_be_joint_is_trained_by_itself(
    make_recipe: Make, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, output = make_recipe(epochs=1, max_steps=2), io.StringIO()
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.sentences(30, seed=5))
    recipes = {
        "joint": recipe,
        "checkpoints": recipe.replace(training={"gradient_checkpointing": True}),
        "rows": recipe.replace(data={"train": str(other)}),
    }
    found = Population(recipes, tmp_path / "p", console=Console(file=output, width=200))
    assert {record.status for record in found.run()} == {"finished"}
    assert "trial checkpoints is trained by itself: training.gradient_checkpointing" in output.getvalue()
    assert "trial rows has another task, model or data, and comes later" in output.getvalue()
    assert_as_alone(recipes, found, tmp_path / "alone")


def test_what_is_not_finished_is_resumed(make_recipe: Make, tmp_path: Path) -> None:
    recipes = unlike(make_recipe(epochs=1, save_steps=3))
    del recipes["targets"]
    whole = Population(recipes, tmp_path / "whole", console=silent())
    whole.run()
    steps = iter(range(100))
    part = Population(recipes, tmp_path / "part", slots=2, console=silent())
    part.run(until=lambda: next(steps) == 12)
    statuses = {record.status for record in part.journal.records.values()}
    assert statuses - {"finished"}, "nothing is left to resume"
    with pytest.raises(LoricaError, match="holds trials already"):
        Population(recipes, tmp_path / "part", console=silent()).run()
    ended: list[Record] = []
    again = Population(recipes, tmp_path / "part", console=silent(), on_end=ended.append)
    assert {record.status for record in again.run(resume=True)} == {"finished"}
    done = {name for name, record in part.journal.records.items() if record.status == "finished"}
    assert {record.name for record in ended} == set(recipes) - done
    for name in recipes:
        theirs, ours = weights(whole.folder(name)), weights(again.folder(name))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        times = [each.time for each in again.journal.record(name).evaluations]
        assert times == list(range(1, len(times) + 1))
        assert [each.metrics for each in again.journal.record(name).evaluations] == [
            each.metrics for each in whole.journal.record(name).evaluations
        ]


def test_no_slot_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slots must be at least 1, not 0"):
        Population([make_recipe()], tmp_path, slots=0)


def test_best_of_a_record_passes_over_what_is_not_a_number(tmp_path: Path) -> None:
    from lorica.tune import Evaluation

    record = Record("x")
    assert math.isnan(record.best("loss", "min"))
    for time, loss in enumerate((0.5, math.nan, 0.7), 1):
        record.evaluations.append(Evaluation(time, time, 0.0, {"loss": loss}, 0.0))
    assert record.best("loss", "min") == 0.5
    assert record.best("eval_loss", "max") == 0.7
