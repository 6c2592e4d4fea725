"""Preferences, rewards and reinforcement, from a recipe to an adapter and back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from train import tiny
from train.post import small
from transformers import AutoModelForCausalLM, TrainerCallback

import lorica
from lorica.errors import ConfigError, FileError, LoricaError
from lorica.train import GenerationConfig, Recipe, evaluate, predict, prepare, train
from lorica.train.adapt import start_of
from lorica.train.post.rewards import AdapterReward, function_of
from lorica.train.run import train_prepared

trl: Any = pytest.importorskip("trl", reason="needs TRL: pip install 'lorica[post]'")


def history(output: Path) -> list[dict[str, Any]]:
    last = max((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("loss", [None, "ipo", "kto", "simpo", "orpo"])
def test_the_margin_of_the_better_answers_grows(
    loss: str | None, decoder: Path, rows: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(decoder, rows, tmp_path, "preference", {"loss": loss})
    result = train(recipe, console=Console(file=io.StringIO()))
    found = result.metrics["validation"]
    assert found["margin"] > 0
    assert "accuracy" not in found or found["accuracy"] >= (0.5 if loss in ("simpo", "orpo") else 0.75)
    assert json.loads((tmp_path / "run.json").read_text())["versions"]["trl"] == trl.__version__
    again = evaluate(tmp_path, small.pairs(4))
    assert again["margin"] > 0
    (said,) = predict(tmp_path, ["film"], generation=GenerationConfig(max_new_tokens=3))
    assert said["prompt"] == "film"
    assert said["generated"] is not None


@pytest.mark.filterwarnings("ignore")  # transformers tells TRL of its own future
def test_the_numbers_are_trls_with_peft(decoder: Path, rows: Path, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    from datasets import Dataset
    from transformers import AutoTokenizer

    recipe = small.recipe(
        decoder,
        rows,
        tmp_path / "ours",
        "preference",
        training={"group_by_length": False, "max_steps": 4, "lr_scheduler": "constant", "warmup_ratio": 0.0},
        data={"validation_fraction": 0},
    )
    train(recipe, console=Console(file=io.StringIO()))
    base = AutoModelForCausalLM.from_pretrained(decoder)
    model = peft.PeftModel.from_pretrained(base, start_of(tmp_path / "ours"), is_trainable=True)
    values: dict[str, Any] = {
        "output_dir": str(tmp_path / "theirs"),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "seed": 0,
        "data_seed": 0,
        "max_length": 128,
        "bf16": False,
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    theirs = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**values),
        train_dataset=Dataset.from_list(small.pairs()),
        processing_class=AutoTokenizer.from_pretrained(decoder),
    )
    theirs.train()
    names = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    ours = [entry for entry in history(tmp_path / "ours") if "loss" in entry]
    assert len(ours) == 4
    for one, other in zip(ours, theirs.state.log_history[:4], strict=True):
        assert {name: one[name] for name in names} == pytest.approx(
            {name: other[name] for name in names}, abs=2e-5
        )


class Stop(TrainerCallback):
    """Fails after a step, as a machine does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def check_resumes(recipe: Recipe, whole: Path) -> None:
    console = Console(file=io.StringIO())
    expected = train(recipe.replace(output=str(whole)), console=console)
    with pytest.raises(KeyboardInterrupt):
        train_prepared(prepare(recipe), console=console, callbacks=[Stop(5)])
    resumed = train(recipe, resume=True, console=console)
    assert resumed.steps == expected.steps
    assert resumed.adapter_sha256 == expected.adapter_sha256
    assert resumed.metrics == expected.metrics


def test_a_run_from_another_adapter_resumes_against_the_same_start(
    decoder: Path, rows: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(decoder)
    recipe = small.recipe(decoder, rows, tmp_path / "again", "preference", init_from=str(tmp_path / "start"))
    lorica.adapt(base, recipe.method.replace(init_lora_weights=False), seed=3)
    lorica.save(base, tmp_path / "start")
    check_resumes(recipe, tmp_path / "whole")
    first = history(tmp_path / "again")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(
        lorica.read(start_of(tmp_path / "again")).factors["model.layers.0.self_attn.q_proj"].A,
        lorica.read(tmp_path / "start").factors["model.layers.0.self_attn.q_proj"].A,
        rtol=0,
        atol=0,
    )


@pytest.fixture(scope="module")
def scorer(decoder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scorer")
    result = train(small.recipe(decoder, rows, output, "reward"), console=Console(file=io.StringIO()))
    assert result.metrics["validation"]["accuracy"] == 1.0
    return output


def test_a_reward_model_ranks_pairs_that_it_has_not_seen(scorer: Path) -> None:
    found = evaluate(scorer, small.pairs(20, seed=7))
    assert found["accuracy"] == 1.0
    assert found["margin"] > 0.5
    good, bad = predict(scorer, ["film\tgreat song", "film\tawful song"])
    assert good["reward"] > bad["reward"]


@pytest.mark.parametrize("task", ["grpo", "rloo"])
def test_rewards_rise_and_a_run_resumes(
    task: str, decoder: Path, rows: Path, rewards: Path, scorer: Path, tmp_path: Path
) -> None:
    post = {
        "rewards": [f"{rewards}:good", f"{rewards}:short", str(scorer)],
        "reward_weights": [1.0, 0.1, 0.2],
        "generations": 8,
        "max_new_tokens": 4,
        "beta": 0.01,
        "arguments": {"steps_per_generation": 2},  # so that a checkpoint falls between two rounds
    }
    training = {"batch_size": 32, "max_steps": 15, "eval_steps": 15, "lr_scheduler": "constant"}
    recipe = small.recipe(decoder, rows, tmp_path / "again", task, post, training=training)
    check_resumes(recipe, tmp_path / "whole")
    assert any((tmp_path / "again").rglob("answers.pt"))
    logged = [
        entry["rewards/good/mean"] for entry in history(tmp_path / "again") if "rewards/good/mean" in entry
    ]
    assert sum(logged[-3:]) / 3 > sum(logged[:3]) / 3 + 0.3
    record = json.loads((tmp_path / "again" / "run.json").read_text())
    found = record["results"]["metrics"]["validation"]
    assert {"reward", "reward_good", "reward_short", f"reward_{scorer.name}", "kl", "length"} <= found.keys()


def test_a_reward_adapter_has_no_base_of_its_own(decoder: Path, scorer: Path) -> None:
    from transformers import AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(decoder)
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules="all-linear"))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    score = AdapterReward(str(scorer), model, AutoTokenizer.from_pretrained(decoder))
    theirs = {p.data_ptr() for p in model.parameters()}
    own = [name for name, p in score.model.named_parameters() if p.data_ptr() not in theirs]
    assert all("lora_" in name or "score" in name for name in own)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains
    given = score(["film", "film"], [" great song", " awful song"])
    expected = [row["reward"] for row in predict(scorer, ["film\t great song", "film\t awful song"])]
    assert given == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_is_refused(decoder: Path, rows: Path, rewards: Path, tmp_path: Path) -> None:
    def refused(task: str, post: dict[str, Any], **more: Any) -> None:
        prepare(small.recipe(decoder, rows, tmp_path, task, post, **more))

    named = [f"{rewards}:good"]
    with pytest.raises(ConfigError, match=r"post.loss of the task preference must be one of .*not 'dapo'"):
        refused("preference", {"loss": "dapo"})
    with pytest.raises(ConfigError, match="grpo needs a reward: --reward"):
        refused("grpo", {})
    with pytest.raises(ConfigError, match=r"8 answers a step, must be a multiple of post.generations, 3"):
        refused("grpo", {"rewards": named, "generations": 3})
    with pytest.raises(ConfigError, match=r"a weight for each of the 1 rewards"):
        refused("grpo", {"rewards": named, "reward_weights": [1.0, 2.0]})
    with pytest.raises(ConfigError, match=r"leaves no room for a prompt in the 64 tokens"):
        refused("grpo", {"rewards": named, "max_new_tokens": 64})
    with pytest.raises(ConfigError, match=r"generation\.metrics compare what is written"):
        refused("preference", {}, generation=GenerationConfig(metrics=["bleu"]))
    with pytest.raises(ConfigError, match=r"data\.streaming is not for preference"):
        refused("preference", {}, data={"streaming": True})
    with pytest.raises(ConfigError, match="which column says whether an answer is wanted"):
        prepare(
            small.recipe(decoder, rows, tmp_path, "preference"), [{"prompt": "film", "answer": "song"}] * 3
        )
    with pytest.raises(ConfigError, match=r"TRL's DPOConfig has no 'bet'.* 'beta'"):
        train(small.recipe(decoder, rows, tmp_path, "preference", {"arguments": {"bet": 1}}))
    with pytest.raises(ConfigError, match=r"TRL refuses this run of the task preference: .*loss_weights"):
        train(small.recipe(decoder, rows, tmp_path, "preference", {"arguments": {"loss_weights": [1, 2]}}))
    with pytest.raises(FileError, match=r"neither a function, path/to/file.py:function, nor the folder"):
        AdapterReward(
            str(tmp_path / "nowhere"), AutoModelForCausalLM.from_pretrained(decoder), tiny.tokenizer()
        )
    with pytest.raises(ConfigError, match=r"has no function 'god'.* 'good'"):
        function_of(f"{rewards}:god")
    with pytest.raises(
        LoricaError, match=r"must return a number for each of 2 completions.* returned 'a lot'"
    ):
        function_of(f"{rewards}:broken")(["a", "b"], ["c", "d"])


def test_a_recipes_rewards_run_only_where_they_are_trusted(
    decoder: Path, rows: Path, rewards: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(decoder, rows, tmp_path, "grpo", {"rewards": [f"{rewards}:good"]})
    path = recipe.save(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match=r"names Python code as its task or reward, '.*rewards\.py:good'"):
        Recipe.load(path)
    assert Recipe.load(path, trust_task=True) == recipe
