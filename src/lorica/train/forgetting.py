"""Forgetting in training: a model's scores on other data, before and after.

A language model is scored on the other data as it is: by the loss of their tokens. An encoder that was
trained to classify has a head for its own task alone, so the question is whether its features still tell the
other classes apart: logistic regression on the mean of the last hidden states, fitted and scored once with
the base's features and once with those of the trained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lorica.config import method_of
from lorica.errors import ConfigError, FileError
from lorica.model import disabled
from lorica.train import tasks
from lorica.train.console import quiet
from lorica.train.data import splits as sources
from lorica.train.data.rows import UsableRows
from lorica.train.data.splits import Splits
from lorica.train.prepared import encode_split
from lorica.train.record import Record
from lorica.train.settings import DataConfig
from lorica.train.tasks import Task
from lorica.train.tasks.texts import TextTask
from lorica.train.trained import Trained, open_run, scoring
from lorica.train.trainer.fit import score

PROBE, LOSS = "probe accuracy", "loss"


@dataclass(frozen=True)
class Forgetting:
    """One run's gain on its own data, and its loss elsewhere.

    Args:
        run: its folder.
        method: how it was trained: ``"lora"``, ``"full"``, ...
        parameters: that trained.
        metric: its task's own, such as ``"accuracy"``.
        learned: its score on its own test rows, or on validation rows where it has none.
        other_metric: ``"loss"`` or ``"probe accuracy"``, on the other data.
        before: the base's score there.
        after: the trained model's.
    """

    run: str
    method: str
    parameters: int
    metric: str
    learned: float
    other_metric: str
    before: float
    after: float

    @property
    def forgotten(self) -> float:
        """Its loss on the other data; below zero where it became better."""
        return self.after - self.before if self.other_metric == LOSS else self.before - self.after


def forgetting(
    runs: Sequence[str | Path], other: DataConfig, *, trust_task: bool = False
) -> list[Forgetting]:
    """Score trained models, and the bases they came from, on data that they were not trained for.

    Args:
        runs: folders that `train` filled, of one task; LoRA and other methods may stand side by side.
        other: the other data. A probe is fitted on its training rows and scored on its test rows, or on
            validation rows where it has none; of a language model the loss is taken on these alone.
        trust_task: as in `open_run`.

    Raises:
        FileError: a folder or the rows are missing.
        ConfigError: the runs are of different tasks, or of one whose forgetting is not measured; or the rows
            do not have the columns that are needed.
    """
    if not runs:
        raise ConfigError("name at least one folder of `lorica train`")
    found: list[Forgetting] = []
    for run in runs:
        trained = open_run(run, trust_task=trust_task)
        if found and trained.task.best_metric != found[0].metric:
            raise ConfigError(
                f"{run} was trained for {trained.task.best_metric}, {found[0].run} for {found[0].metric}; "
                "runs are compared on one task"
            )
        results = Record.load(run, trust_task=trust_task).results
        learned = _learned(results, run, trained.task.best_metric)
        metric, before, after = _elsewhere(trained, other)
        found.append(
            Forgetting(
                run=str(run),
                method=method_of(trained.recipe.configuration()),
                parameters=results["trainable"],
                metric=trained.task.best_metric,
                learned=learned,
                other_metric=metric,
                before=before,
                after=after,
            )
        )
    return found


def at_equal_score(found: Sequence[Forgetting]) -> list[Forgetting]:
    """Of each method the run that comes nearest to the best score that all of them reach.

    Forgetting grows with learning, so methods are compared where they have learned as much; with several runs
    of each (other rates, ranks or durations) that is possible. How near they came is in `learned`.

    Args:
        found: results of `forgetting`, of at least two methods.

    Raises:
        ConfigError: they are of one method.
    """
    methods = list(dict.fromkeys(each.method for each in found))
    if len(methods) < 2:
        raise ConfigError(f"all runs are of one method, {methods}; name a run of another beside it")
    sign = -1 if found[0].metric == LOSS else 1
    level = min(max(sign * each.learned for each in found if each.method == method) for method in methods)
    return [
        min(
            (each for each in found if each.method == method),
            key=lambda each: (abs(sign * each.learned - level), each.forgotten),
        )
        for method in methods
    ]


def _elsewhere(trained: Trained, other: DataConfig) -> tuple[str, float, float]:
    """The metric, and its value for the base and for the trained model."""
    if not trained.task.reads_outputs:
        measure, name = _loss, LOSS
    elif isinstance(trained.task, TextTask):
        measure, name = _probe, PROBE
    else:
        raise ConfigError(
            f"forgetting is measured of language models and of models that classify texts, not for "
            f"{trained.recipe.task}"
        )
    splits = sources.load(other)
    with disabled(trained.model):
        before = measure(trained, other, splits)
    return name, before, measure(trained, other, splits)


def _loss(trained: Trained, other: DataConfig, splits: Splits) -> float:
    """Mean over all target tokens."""
    data = trained.task.resolve(splits, other)
    rows = _encoded(trained, trained.task, data, _held_out(splits))
    with scoring(trained) as trainer:
        return score(trainer, rows)["loss"]


def _probe(trained: Trained, other: DataConfig, splits: Splits) -> float:
    """Share of rows whose class logistic regression finds from the encoder's features."""
    task = tasks.get("sequence-classification")
    data = task.resolve(splits, other)
    splits = sources.without_unlabelled(splits, data)
    (learn, known), (held, true) = (
        (_features(trained, rows), rows["labels"])
        for rows in (
            _encoded(trained, task, data, used) for used in (splits.used()["train"], _held_out(splits))
        )
    )
    probe: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(learn.numpy(), known)
    return float(probe.score(held.numpy(), true))


def _encoded(trained: Trained, task: Task, data: DataConfig, used: UsableRows) -> Dataset:
    """The other rows, in the tokens and to the length of the run."""
    with quiet():
        return encode_split(trained.recipe.replace(data=data), task, trained.tokenizer, used)[0].features


@torch.no_grad()
def _features(trained: Trained, rows: Dataset) -> Tensor:
    """The mean of each row's last hidden states, its padding left out: (rows, width) in float64."""
    encoder: Any = trained.model.base_model
    collate = trained.task.collator(trained.tokenizer)
    columns = [name for name in rows.column_names if name not in ("labels", "length")]
    batch = trained.recipe.training.eval_batch_size
    found = []
    for start in range(0, len(rows), batch):
        part = rows.select_columns(columns)[start : start + batch]
        count = len(part["input_ids"])
        inputs = collate([{name: part[name][i] for name in columns} for i in range(count)]).to(
            trained.model.device
        )
        states = encoder(**inputs).last_hidden_state.double()
        there = inputs["attention_mask"].unsqueeze(-1).double()
        found.append(((states * there).sum(1) / there.sum(1)).cpu())
    return torch.cat(found)


def _held_out(splits: Splits) -> UsableRows:
    """Rows that nothing was fitted on."""
    found = splits.used()
    if "test" not in found and "validation" not in found:
        raise FileError("the other data have neither test nor validation rows; name some with --data.test")
    return found["test" if "test" in found else "validation"]


def _learned(results: dict[str, Any], run: str | Path, metric: str) -> float:
    """A run's score on rows that it did not learn from."""
    scored = results["metrics"].get("test") or results["metrics"].get("validation")
    if not scored:
        raise FileError(f"{run} was scored on no rows; train it with test or validation rows")
    return scored[metric]
