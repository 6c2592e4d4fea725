"""A run of post-training once more, by TRL's own trainer and PEFT: the same rows, start, seed and rate.

TRL tokenizes the rows as texts, PEFT reads the adapter as the run began. Where the arithmetic is the same, so
are the losses of every step.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset

import lorica
from lorica.train import Recipe, Record
from lorica.train.console import quiet, scores
from lorica.train.post.rewards import function_of
from lorica.train.prepared import prepare, read, with_head
from lorica.train.trainer.checkpoints import STATE, last_checkpoint

SCORES = {
    "accuracy": ("eval_rewards/accuracies", "eval_accuracy"),
    "margin": ("eval_rewards/margins", "eval_margin"),
    "reward": ("eval_reward",),
    "length": ("eval_completions/mean_length",),
}
"""A run's scores → what TRL calls them."""


@dataclass(frozen=True)
class Beside:
    """Two runs side by side.

    Args:
        steps: logged losses, that both have.
        apart: the largest difference of two losses of a step.
        scores: TRL's and PEFT's on the rows that the run is scored on.
    """

    steps: int
    apart: float
    scores: dict[str, float]

    def __str__(self) -> str:
        """A line for the page."""
        same = "the same losses" if self.apart < 1e-3 else "other losses"
        how = f"at most {self.apart:.0e} apart" if self.apart else "to the bit"
        found = ", ".join(f"{name} {value}" for name, value in dict(scores(self.scores)).items())
        return f"TRL with PEFT: {same} of {self.steps} steps, {how}; {found}."


def beside(folder: Path) -> Beside:
    """Train a run's twin, and compare.

    Args:
        folder: that of a run of `lorica train`, of a task that TRL carries.
    """
    recipe = Record.load(folder, trust_task=True).recipe
    last = last_checkpoint(folder / "checkpoints")
    assert last is not None
    ours = _losses(json.loads((last / STATE).read_text(encoding="utf-8"))["log_history"])
    with tempfile.TemporaryDirectory() as work, quiet():
        trainer, scored = _trainer(recipe, Path(work))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        theirs = _losses(trainer.state.log_history)
        found = trainer.evaluate(scored)
    apart = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    named = {name: found[key] for name, keys in SCORES.items() for key in keys if key in found}
    return Beside(len(ours), apart, named)


def _losses(history: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def _trainer(recipe: Recipe, work: Path) -> tuple[Any, Dataset]:
    """TRL's trainer of a recipe, and the rows that the run is scored on."""
    _, task, used = read(recipe)
    rows = {split: _texts(each.rows, recipe) for split, each in used.items()}
    prepared = prepare(recipe)
    method = with_head(recipe.configuration(), task)
    model = lorica.adapt(prepared.model, method, seed=recipe.training.seed)
    start = lorica.save(model, work / "start")
    lorica.detach(model)
    kind = {"preference": "DPO", "reward": "Reward", "grpo": "GRPO"}[recipe.task]
    options: dict[str, Any] = {}
    if recipe.task == "grpo":
        options["reward_funcs"] = [function_of(entry) for entry in recipe.post.rewards]
    elif recipe.post.loss == "kto":
        kind = "KTO"
        rows = {split: _apart(each) for split, each in rows.items()}
        rows["train"] = rows["train"].shuffle(seed=recipe.training.seed)
    base = getattr(transformers, task.auto_class).from_pretrained(recipe.model, **task.head(recipe.data))
    task.pad(base, prepared.tokenizer)
    theirs = peft.PeftModel.from_pretrained(base, str(start), is_trainable=True)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=theirs,
        args=_arguments(recipe, getattr(trl, f"{kind}Config"), work),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=prepared.tokenizer,
        **options,
    )
    return trainer, trainer.eval_dataset


def _texts(rows: Dataset, recipe: Recipe) -> Dataset:
    """Rows as TRL reads them: the separator belongs to the prompt."""
    if recipe.task == "grpo":
        return rows.map(lambda row: {"prompt": row["prompt"] + recipe.data.separator})
    return rows


def _apart(rows: Dataset) -> Dataset:
    """Pairs as answers that were judged alone."""
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows.to_list()
            for side in ("chosen", "rejected")
        ]
    )


def _arguments(recipe: Recipe, config: Any, work: Path) -> Any:
    training, post = recipe.training, recipe.post
    values: dict[str, Any] = {
        "output_dir": str(work / "run"),
        "learning_rate": training.learning_rate,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "weight_decay": training.weight_decay,
        "warmup_steps": training.warmup_ratio,
        "lr_scheduler_type": training.lr_scheduler,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_steps": training.logging_steps,
        "gradient_checkpointing": False,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if recipe.task == "grpo":
        values |= {
            "num_generations": post.generations,
            "max_completion_length": post.max_new_tokens,
            "temperature": post.temperature,
            "top_p": post.top_p,
            "disable_dropout": True,
        }
    else:
        values["max_length"] = training.max_length
    if post.beta is not None:
        values["beta"] = post.beta
    if post.loss == "kto":
        values["train_sampling_strategy"] = "sequential"
    return config(**values)
