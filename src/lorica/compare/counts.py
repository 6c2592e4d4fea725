"""What each method of a comparison would train, from the models' configurations alone."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.compare.check import typed
from lorica.compare.file import Comparison
from lorica.config import AdapterConfig, family_of
from lorica.model import adapt, trainable_parameters
from lorica.model.skeleton import skeleton
from lorica.model.structure import saved_modules
from lorica.train import tasks
from lorica.train.embedded import resolve_model
from lorica.train.tasks import Task


@dataclass(frozen=True)
class Count:
    """Trainable parameters of a method on a model.

    Args:
        model: as the recipe names it.
        method: name of the method.
        family: selective, reparametrisation, additive, or prompting.
        trainable: parameters that train, a new head left out.
        total: of the model.
    """

    model: str
    method: str
    family: str
    trainable: int
    total: int


def counts(spec: Comparison) -> list[Count]:
    """Count every method on every model of a comparison; no weight and no row is read.

    Raises:
        ConfigError: no configuration of a model can be had.
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
    """Of the model that the task trains, its new head left out."""
    adapted = adapt(skeleton(model, task.task_type), typed(config, task))
    kept = config.modules_to_save or ()
    heads = [
        module.modules_to_save
        for path, module in saved_modules(adapted).items()
        if path.rpartition(".")[2] not in kept
    ]
    new = sum(p.numel() for head in heads for p in head.parameters())
    return trainable_parameters(adapted).trainable - new
