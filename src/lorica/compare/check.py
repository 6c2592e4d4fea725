"""Checks before anything runs: rows, models and methods must fit together; counts of trainable parameters."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.compare.file import Comparison
from lorica.config import AdapterConfig, family_of
from lorica.errors import ConfigError, LoricaError, lines
from lorica.layers import saved_modules
from lorica.methods.positions import is_causal
from lorica.model import adapt, trainable_parameters
from lorica.model.pretrained.skeleton import skeleton
from lorica.train import tasks
from lorica.train.embedded import resolve_model
from lorica.train.prepared import read
from lorica.train.recipe import Recipe
from lorica.train.tasks import SequenceClassification, Task
from lorica.train.trainer.arguments import LOWER_IS_BETTER


def check(spec: Comparison) -> dict[str, str]:
    """Read every task's rows, and try every method on a model without weights; nothing is trained or written.

    Returns:
        The metric of each task.

    Raises:
        ConfigError: lists all problems, one per line.
    """
    problems: list[str] = []
    metrics: dict[str, str] = {}
    for name, entry in spec.tasks.items():
        try:
            metrics[name] = entry.metric or _metric(spec, name)
            _check_rows(spec, name)
        except LoricaError as error:
            problems.append(f"{name}: {error}")
            continue
        for method in spec.methods:
            try:
                check_method(spec, name, method)
            except LoricaError as error:
                problems.append(f"{method} on {name}: {error}")
    if problems:
        raise ConfigError(f"the comparison cannot be made:\n{lines(problems)}")
    return metrics


def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error; all others are scores."""
    return metric in LOWER_IS_BETTER


def check_method(spec: Comparison, name: str, method: str) -> None:
    """Try a method on a task's model, made without values.

    Raises:
        LoricaError: the architecture cannot take it.
    """
    recipe, task, entry = spec.laid(name, method), _task(spec, name), spec.methods[method]
    model = resolve_model(recipe.model)
    if entry.few_shot is not None:
        reads = isinstance(task, SequenceClassification) or task.task_type == "CAUSAL_LM"
        if not reads or task.carrier is not None:
            raise ConfigError(f"few-shot is for classification and language modelling, not for {task.name}")
        if not is_causal(skeleton(model, "CAUSAL_LM")):
            raise ConfigError(f"few-shot needs a decoder, and {recipe.model} is none")
        return
    adapt(skeleton(model, task.task_type), typed(recipe.configuration(), task))


def typed(config: AdapterConfig, task: Task) -> AdapterConfig:
    """A configuration that trains the task's new head too."""
    return config if config.task_type else config.replace(task_type=task.task_type)


def _metric(spec: Comparison, name: str) -> str:
    return _first(spec, name).training.metric_for_best or _task(spec, name).best_metric


def _first(spec: Comparison, name: str) -> Recipe:
    return spec.laid(name, next(iter(spec.methods)))


def _task(spec: Comparison, name: str) -> Task:
    return tasks.get(_first(spec, name).task)


def _check_rows(spec: Comparison, name: str) -> None:
    recipe = _first(spec, name)
    if spec.sizes != (None,):  # each takes the place of train_rows
        recipe = recipe.replace(data={"train_rows": None})
    _, _, used = read(recipe)
    if spec.split not in used:
        raise ConfigError(
            f"there are no {spec.split} rows to score; name some with data.{spec.split}, or choose another "
            "split"
        )
    choosing = [method for method, entry in spec.methods.items() if len(entry.learning_rates) > 1]
    if choosing and "validation" not in used:
        raise ConfigError(f"{choosing[0]} has several learning_rates, and no validation rows to choose by")
    there = len(used["train"].rows)
    for rows in spec.sizes:
        if rows is not None and rows > there:
            raise ConfigError(f"{there:,} training rows are fewer than the {rows:,} of sizes")


@dataclass(frozen=True)
class Count:
    """The number of trainable parameters of a method on a model.

    Args:
        model: name of the model, as in the recipe.
        method: name of the method.
        family: selective, reparametrisation, additive, or prompting.
        trainable: number of parameters that train, without a new head.
        total: number of parameters of the model.
    """

    model: str
    method: str
    family: str
    trainable: int
    total: int


def counts(spec: Comparison) -> list[Count]:
    """Count the parameters of every method on every model of a comparison; reads no weights and no rows.

    Raises:
        ConfigError: a model's configuration cannot be loaded.
        TargetError: an architecture cannot take a method.
    """
    found: dict[tuple[str, str], Count] = {}
    totals: dict[str, int] = {}
    for task in spec.tasks:
        for method, entry in spec.methods.items():
            recipe = spec.laid(task, method)
            if (recipe.model, method) in found:
                continue
            model, config = resolve_model(recipe.model), recipe.configuration()
            if model not in totals:
                totals[model] = sum(p.numel() for p in skeleton(model).parameters())
            prompting = entry.few_shot is not None
            found[recipe.model, method] = Count(
                recipe.model,
                method,
                "prompting" if prompting else family_of(config),
                0 if prompting else _trainable(model, config, tasks.get(recipe.task)),
                totals[model],
            )
    return list(found.values())


def _trainable(model: str, config: AdapterConfig, task: Task) -> int:
    """Counts for the model that the task trains, without its new head."""
    adapted = adapt(skeleton(model, task.task_type), typed(config, task))
    kept = config.modules_to_save or ()
    heads = [
        module.modules_to_save
        for path, module in saved_modules(adapted).items()
        if path.rpartition(".")[2] not in kept
    ]
    new = sum(p.numel() for head in heads for p in head.parameters())
    return trainable_parameters(adapted).trainable - new
