"""The cost of a recipe's training: of the model, head and method that `train` would make, without weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

from lorica.config import method_of
from lorica.errors import ConfigError
from lorica.study.planning import Plan, Preview, largest_batch, plan, preview
from lorica.train import presets, tasks
from lorica.train.embedded import resolve_model
from lorica.train.prepared import read, with_head
from lorica.train.recipe import Recipe
from lorica.train.settings import FREE, DataConfig
from lorica.train.tasks import Task
from lorica.train.tasks.base import positions_of
from lorica.train.tasks.post.answers import PostTask
from lorica.train.tasks.post.grouped import Grouped, LeaveOneOut

METHODS = ("lora", "full", "qlora")


def preview_recipe(recipe: Recipe) -> Preview:
    """The modules that `train(recipe)` would adapt, train whole and add, one by one; no weight is read.

    Raises:
        LoricaError: as of `plan_recipe`.
    """
    recipe = presets.apply(recipe, own_rows=False)
    task = tasks.get(recipe.task)
    return preview(_settings(recipe, task), with_head(recipe.configuration(), task))


def plan_recipe(
    recipe: Recipe,
    *,
    method: str | None = None,
    gigabytes: float | None = None,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw",
) -> Plan:
    """One step of `train(recipe)`: its model with its task's head, its targets, its batch.

    Where the recipe names rows or their labels, the head has as many classes as they; so the rows are read.

    Args:
        recipe: the run.
        method: ``"lora"``, ``"full"`` or ``"qlora"`` in place of the recipe's own.
        gigabytes: find the largest batch that fits into so much memory, in units of 10⁹ bytes; None plans the
            recipe's batch.
        dtype: of the model's weights; None takes what the model's configuration names, as loading does.
        optimizer: as of `lorica.plan`.

    Raises:
        LoricaError: the recipe, its rows, its model or its method cannot be planned.
    """
    if method is not None and method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    recipe = presets.apply(recipe, own_rows=False)
    task = tasks.get(recipe.task)
    settings = _settings(recipe, task)
    config: Any = with_head(recipe.configuration(), task)
    chosen = method or _method(recipe)
    if method is not None and method_of(config) != "lora":
        config = with_head(recipe.method, task)
    length = _length(recipe, task)
    length = min(length, positions_of(settings) or length)
    options: dict[str, Any] = {
        "method": chosen,
        "length": length,
        "dtype": dtype or _dtype(settings),
        "optimizer": optimizer,
        "checkpointing": recipe.training.gradient_checkpointing,
    }
    batch = recipe.training.batch_size
    if gigabytes is not None:
        fits = largest_batch(settings, gigabytes, config, **options).batch
        batch = fits // task.sequences
        if not batch:
            raise ConfigError(
                f"not even one row fits into {gigabytes:g} GB: {task.name} reads {task.sequences} sequences "
                f"of {length} tokens for each"
            )
    found = plan(settings, config, batch=batch * task.sequences, **options)
    if isinstance(task, PostTask):
        found = _of_post(found, task, recipe)
    order = "of similar lengths" if task.by_length(recipe.training) else "drawn at random"
    line = f"a batch's rows are {order} (training.group_by_length); each is counted as {length} tokens"
    found = dataclasses.replace(found, assumptions=(*found.assumptions, line))
    named = method_of(config)
    return found if named in ("lora", "full") else dataclasses.replace(found, method=named)


def _length(recipe: Recipe, task: Task) -> int:
    """Tokens of a sequence: of answers that are written in training, those of the prompt and the answer."""
    answer = recipe.post.max_new_tokens if isinstance(task, Grouped) else 0
    return recipe.training.max_length + answer


def _of_post(found: Plan, task: PostTask, recipe: Recipe) -> Plan:
    """A plan with the reference's copy of what trains, and what post-training assumes."""
    lines = []
    if task.sequences > 1:
        lines.append(f"each row is {task.sequences} sequences, one an answer: half as many rows a batch")
    if isinstance(task, Grouped):
        lines.append("each row of a batch is a prompt and an answer; the writing of answers is not counted")
    held = 0
    refers = recipe.post.loss not in FREE and not (isinstance(task, Grouped) and not _pulled(recipe))
    if task.keeps_start and refers:
        held = found.gradients  # of the same tensors, in the same dtypes
        lines.append("the reference is a copy of what trains; its forward pass is not counted")
    return dataclasses.replace(found, weights=found.weights + held, assumptions=(*found.assumptions, *lines))


def _pulled(recipe: Recipe) -> bool:
    """Whether reinforcement is measured against a reference; TRL's default is so for rloo alone."""
    beta = recipe.post.beta
    return beta > 0 if beta is not None else recipe.task == LeaveOneOut.name


def _head(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Fields of the model's configuration that make the head fit; those of its classes need the rows."""
    data = recipe.data
    if "id2label" in task.head(data) and not data.labels:
        if data.train == DataConfig().train and task.name != Recipe().task:
            return {}  # no rows are named that it could be trained on: as many classes as the model has
        data = read(recipe)[0].data
    return task.head(data)


def _settings(recipe: Recipe, task: Task) -> Any:
    """The model's configuration with the task's head, as `Task.model` loads it."""
    try:
        found = transformers.AutoConfig.from_pretrained(
            resolve_model(recipe.model), trust_remote_code=False, **_head(recipe, task)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ConfigError(f"no model configuration can be had from {recipe.model!r}: {reason}") from error
    mapping = getattr(transformers, task.auto_class)._model_mapping
    if type(found) not in mapping:
        raise ConfigError(f"{type(found).__name__} has no model for {task.name}")
    made = mapping[type(found)]
    found.architectures = [(made[0] if isinstance(made, (list, tuple)) else made).__name__]
    return found


def _method(recipe: Recipe) -> str:
    """The method of the plan: full, on a base of four bits, or LoRA."""
    if recipe.quantization == "int8":
        raise ConfigError(
            "a plan counts bases of 4 bits (quantization: nf4) and of full precision, not of int8"
        )
    if recipe.quantization is not None:
        return "qlora"
    return "full" if method_of(recipe.configuration()) == "full" else "lora"


def _dtype(settings: Any) -> torch.dtype:
    found = getattr(settings, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32
