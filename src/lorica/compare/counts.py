"""What each method of a comparison would train, from the models' configurations alone."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.compare.file import Comparison
from lorica.config import family_of
from lorica.model import count
from lorica.model.skeleton import skeleton
from lorica.train.embedded import resolve_model


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
                0 if prompting else count(config.replace(task_type=None), model).trainable,
                totals[model],
            )
    return list(found.values())
