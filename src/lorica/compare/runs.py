"""The runs of a comparison, each a recipe with a rate and a seed; the choice of each method's rate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorica.compare.check import lower_is_better
from lorica.compare.file import Comparison, FewShot
from lorica.compare.results import Results, fingerprint, score_of
from lorica.train import tasks
from lorica.train.embedded import resolve_model
from lorica.train.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        task: name of its task in the comparison.
        method: name of its method.
        rate: learning rate, or None for prompting.
        seed: its seed.
        recipe: of the run, without its output folder.
        few_shot: settings of prompting instead of training.
    """

    task: str
    method: str
    rate: float | None
    seed: int
    recipe: Recipe
    few_shot: FewShot | None = None

    @cached_property
    def key(self) -> str:
        """Fingerprint of the recipe and its data: the same for the same work, wherever its files are.

        Names of task and method do not count, nor do fields at their defaults, so that a new field of recipes
        does not void finished runs.
        """
        # Rows of similar lengths shared a batch by default once: a key says where they do not.
        together = self.few_shot is not None or tasks.get(self.recipe.task).by_length(self.recipe.training)
        recipe = self.recipe.replace(training={"group_by_length": None if together else False})
        content = _unlike(recipe.to_dict(), Recipe().to_dict())
        content.pop("output", None)
        data = content.setdefault("data", {})
        for name in ("train", "validation", "test"):
            if isinstance(source := getattr(self.recipe.data, name), str):
                data[name] = fingerprint(source)
        if self.recipe.init_from is not None:
            content["init_from"] = fingerprint(self.recipe.init_from)
        content["model"] = fingerprint(resolve_model(self.recipe.model))
        if self.few_shot is not None:
            for name in ("method", "baseline"):
                content.pop(name, None)
            content["few_shot"] = dataclasses.asdict(self.few_shot)
        text = json.dumps(_in_order(content), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def __str__(self) -> str:
        """A line that describes the run."""
        rows = self.recipe.data.train_rows
        parts = [self.task, *([] if rows is None else [f"{rows:,} rows"]), self.method]
        parts += [] if self.rate is None else [f"lr {self.rate:g}"]
        return " · ".join([*parts, f"seed {self.seed}"])


def _in_order(value: Any, name: str = "") -> Any:
    """Plain values whose patterns, of which the first match wins, keep an order that sorting would lose."""
    if isinstance(value, Mapping):
        if name.endswith("_pattern") and list(value) != sorted(value):
            return [[key, held] for key, held in value.items()]
        return {key: _in_order(held, key) for key, held in value.items()}
    return [_in_order(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Cell:
    """A method on a task: its trials of learning rates, and the seeds with the best of them.

    Args:
        task: name of the task.
        method: name of the method.
        size: one of `Comparison.sizes`.
        metric: metric that decides.
        also: other metrics to show.
        trials: a run per learning rate, with the first seed.
        seeds: all seeds.
    """

    task: str
    method: str
    size: int | None
    metric: str
    also: tuple[str, ...]
    trials: list[Run]
    seeds: tuple[int, ...]

    def at(self, trial: Run) -> list[Run]:
        """The runs over all seeds at a trial's learning rate; the trial itself is one of them."""
        return [
            dataclasses.replace(trial, seed=seed, recipe=trial.recipe.replace(training={"seed": seed}))
            for seed in self.seeds
        ]

    @property
    def expected(self) -> int:
        """Runs that it takes."""
        return len(self.trials) + len(self.seeds) - 1


def cells(spec: Comparison, metrics: dict[str, str]) -> list[Cell]:
    """All cells of a comparison, task by task.

    Args:
        spec: the comparison.
        metrics: the metric of each task that decides.

    Raises:
        ConfigError: a method's fields on a task are not a valid recipe.
    """
    found = []
    for task, judged in spec.tasks.items():
        for size in spec.sizes:
            for method, entry in spec.methods.items():
                recipe = spec.laid(task, method)
                if size is not None:
                    recipe = recipe.replace(data={"train_rows": size})
                rates = entry.learning_rates or (recipe.training.learning_rate,)
                first = spec.seeds[0]
                trials = [
                    Run(
                        task,
                        method,
                        None if entry.few_shot else rate,
                        first,
                        recipe.replace(training={"learning_rate": rate, "seed": first}),
                        entry.few_shot,
                    )
                    for rate in rates
                ]
                found.append(Cell(task, method, size, metrics[task], judged.also, trials, spec.seeds))
    return found


def _unlike(value: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    result: dict[str, Any] = {}
    for name, item in value.items():
        before = default.get(name)
        if item == before:
            continue
        both = isinstance(item, dict) and isinstance(before, dict)
        result[name] = _unlike(item, before) if both else item  # type: ignore[arg-type]
    return result


def choose(cell: Cell, results: Results) -> Run | None:
    """The trial that was best on the validation rows; None as long as none has a result.

    A score that is not a number never wins; among equal scores the first given does. A single trial is chosen
    without a score.

    Raises:
        ConfigError: the runs do not have that metric.
    """
    tried = [(run, row) for run in cell.trials if (row := results.get(run.key)) is not None]
    if len(cell.trials) == 1:
        return tried[0][0] if tried else None
    sign = -1 if lower_is_better(cell.metric) else 1
    best: tuple[float, Run] | None = None
    for run, row in tried:
        value = score_of(row, "validation", cell.metric)
        if value is not None and (best is None or sign * value > best[0]):
            best = sign * value, run
    return None if best is None else best[1]
