"""Search a space: train trials, together or by Ray, and keep the best."""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from lorica.checkpoint.atomic import staged
from lorica.errors import ConfigError, FileError, LoricaError, listing, require
from lorica.train import presets, tasks
from lorica.train.console import make_console, quiet
from lorica.train.data import splits as sources
from lorica.train.embedded import resolve_model
from lorica.train.recipe import Recipe
from lorica.train.run import RECIPE
from lorica.train.system import alone_in, write_atomically
from lorica.tune.figures import write_figures
from lorica.tune.in_processes import ProcessSearch, check_trials
from lorica.tune.journal import ENDED, TRIALS, Journal, NoMetric, Record
from lorica.tune.population import Population
from lorica.tune.population.shared_base import shared_fields, why_alone
from lorica.tune.progress import trials_table, write_table
from lorica.tune.samplers import Sampler, make_sampler
from lorica.tune.schedulers import Goal, evaluations, mode_of, scheduler_of
from lorica.tune.settings import SEARCH, SearchConfig, check_same, in_order, settings
from lorica.tune.space import Space, documents

_PAIRS = (("query", "value"), ("q_lin", "v_lin"), ("q_proj", "v_proj"), ("q", "v"))
BEST = "best"


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        directory: its folder.
        goal: the metric that decided.
        records: one record per trial.
        best: the record of the best trial that finished, or None.
    """

    directory: Path
    goal: Goal
    records: list[Record] = field(repr=False)
    best: Record | None

    @property
    def folder(self) -> Path | None:
        """The folder with the best trial's adapter and recipe, as `lorica.train.train` writes them."""
        return None if self.best is None else self.directory / BEST


def search(
    recipe: Recipe,
    space: Space | Mapping[str, Any] | None = None,
    directory: str | Path = "runs/tune",
    config: SearchConfig | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> SearchResult:
    """Search a space around a recipe.

    The folder receives ``results.jsonl`` (a line per evaluation and per end), ``trials.csv``, ``figures/``, a
    folder per trial under ``trials/``, and ``best/``: the adapter of the best finished trial at its best
    checkpoint, with the recipe that makes it.

    Args:
        recipe: the fields that all trials share.
        space: the fields to search. None takes learning rate, rank, targets and dropout, as LoRA's tutorials.
        directory: folder to write.
        config: how to search; defaults if None.
        resume: continue the search in the folder, which must be the same one. Trials that ended stay; the
            others continue from their newest checkpoints.
        console: where to show progress. None makes a console.

    Raises:
        ConfigError: the space, the recipe or the configuration cannot be used; nothing was started.
        LoricaError: the folder holds another search.
    """
    config, console = config or SearchConfig(), console or make_console()
    with alone_in(directory, "search") as folder:
        return _search(recipe, space, folder, config, resume=resume, console=console)


def _search(
    recipe: Recipe,
    space: Space | Mapping[str, Any] | None,
    directory: Path,
    config: SearchConfig,
    *,
    resume: bool,
    console: Console,
) -> SearchResult:
    recipe = presets.apply(recipe)
    space = space if isinstance(space, Space) else Space(space) if space else _documents(recipe)
    goal = _goal(recipe, config)
    # A trial ranks by its best evaluation, so it must end with those weights.
    recipe = in_order(goal.into(recipe).replace(training={"load_best": True}), directory / SEARCH)
    space.check(recipe)
    longer = longest(recipe, space)
    _check_validated(longer)
    sampler = make_sampler(config.algorithm, space, config.seed, 2 if config.small else 1)
    reason = _why_apart(longer, space)
    engine = config.where or ("population" if reason is None and config.address is None else "ray")
    if engine == "ray":
        require("ray.tune", extra="tune")
    if config.launch.processes is not None:
        check_trials(longer, space, config.launch, here=engine == "processes")
    rule = scheduler_of(config, longer)
    check_same(directory, recipe, space, config, resume=resume)
    write_atomically(directory / SEARCH, settings(recipe, space, config))
    console.print(_announced(engine, config, reason), soft_wrap=True)
    for note in notes(longer, sampler, config):
        console.print(note, soft_wrap=True)

    trials = _Trials(recipe, space, sampler, config, goal)
    ends = math.inf if config.time_budget is None else time.monotonic() + config.time_budget
    options: dict[str, Any] = {
        "scheduler": rule,
        "goal": goal,
        "values": lambda name, recipe: trials.values[name],
        "console": console,
        "on_end": trials.report,
    }
    if engine == "population":
        population = Population(trials, directory, slots=config.slots, **options)
        trials.recall(population.journal)
        records = population.run(resume=True, until=lambda: time.monotonic() > ends)
    elif engine == "processes":
        apart = ProcessSearch(trials, directory, config, **options)
        trials.recall(apart.journal)
        records = apart.run(ends)
    else:
        from lorica.tune.on_ray import RaySearch

        count = min(config.trials, sampler.size)
        runner = RaySearch(
            trials, longer, directory, config, count=int(count), joint=reason is None, **options
        )
        trials.recall(runner.journal)
        records = runner.run(ends)
    result = SearchResult(directory, goal, records, best_of(records, goal))
    keep_best(result)
    write_table(result.records, directory, goal)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no figures: matplotlib is not installed; it comes with: pip install 'lorica[study]'")
    else:
        write_figures(result.records, space, goal, directory)
    console.print(trials_table(result.records, goal))
    if result.best is None:
        console.print("no trial finished with a score, so there is no best")
    return result


def best_of(records: list[Record], goal: Goal) -> Record | None:
    """The finished trial with the best score; NaN never wins, and the first of equals does."""
    finished = [
        r for r in records if r.status == "finished" and not math.isnan(r.best(goal.metric, goal.mode))
    ]
    sign = 1 if goal.mode == "max" else -1
    return max(finished, key=lambda record: sign * record.best(goal.metric, goal.mode), default=None)


def keep_best(result: SearchResult) -> None:
    """Copy the best trial's folder without checkpoints and logs to ``best/``, all or nothing."""
    if result.best is None:
        return
    target = result.directory / BEST
    with staged(result.directory) as stage:
        copy = stage / BEST
        left_out = shutil.ignore_patterns("checkpoints", "tensorboard", "log.txt")
        shutil.copytree(result.directory / TRIALS / result.best.name, copy, ignore=left_out)
        made = Recipe.load(copy / RECIPE, trust_task=True)  # written by this very search
        made.replace(output=str(target)).save(copy / RECIPE)
        if target.exists():
            target.rename(stage / "before")
        copy.rename(target)


class _Trials(Iterator[tuple[str, Recipe]]):
    """Makes a trial's name and recipe whenever a slot is free, and reports results to the sampler."""

    def __init__(
        self, recipe: Recipe, space: Space, sampler: Sampler, config: SearchConfig, goal: Goal
    ) -> None:
        self.values: dict[str, dict[str, Any]] = {}
        self.journal: Journal | None = None
        self._recipe, self._space, self._sampler = recipe, space, sampler
        self._config, self._goal = config, goal
        self._index = 0
        self._ends = False
        self._reported: set[str] = set()

    def __next__(self) -> tuple[str, Recipe]:
        """The next trial: one from before a resume, unchanged, or a new one."""
        assert self.journal is not None
        while self._index < self._config.trials and not self._ends:
            name = f"{self._index:03d}"
            known = self.journal.records.get(name)
            values = known.values if known is not None else self._sampler.values(self._index)
            if values is None:
                break
            self._index += 1
            self.values[name] = dict(values)
            try:
                return name, presets.apply(self._space.recipe(self._recipe, values))
            except (LoricaError, TypeError, ValueError) as error:  # values that exclude each other
                if known is None or known.status not in ENDED:
                    self.journal.begin(name, values)
                    self.journal.ended(name, "failed", error=f"{type(error).__name__}: {error}")
                    self.report(self.journal.record(name))
        raise StopIteration

    def recall(self, journal: Journal) -> None:
        """Take the search's journal, and tell the sampler of the trials in it."""
        self.journal = journal
        for record in journal.records.values():
            if foreign := [name for name in record.values if name not in self._space.searched]:
                raise FileError(
                    f"trial {record.name} in {journal.path} sets {listing(map(str, foreign))}, which this "
                    "search does not vary; the file is damaged"
                )
            if record.status in ENDED:
                self.report(record)
            else:
                self._sampler.take_up(record.values)

    def report(self, record: Record) -> None:
        """Tell the sampler a trial's result: its best score, and the negative count of its parameters."""
        if record.name in self._reported:
            return
        self._reported.add(record.name)
        # Nothing has the metric that decides: all others would train to their first evaluation for nothing.
        self._ends = self._ends or (record.error or "").startswith(f"{NoMetric.__name__}: ")
        score = record.best(self._goal.metric, self._goal.mode)
        scores = [score if self._goal.mode == "max" else -score]
        if self._config.small:
            last = record.evaluations[-1].metrics if record.evaluations else {}
            scores.append(-last.get("parameters", math.nan))
        self._sampler.tell(record.values, scores if record.status != "failed" else [math.nan] * len(scores))


def _documents(recipe: Recipe) -> Space:
    from lorica.tune.searching import query_and_value

    return documents(*query_and_value(recipe))


def _goal(recipe: Recipe, config: SearchConfig) -> Goal:
    own = Goal.of(recipe)
    metric = own.metric if config.metric is None else config.metric.removeprefix("eval_")
    return Goal(metric, config.mode or (own.mode if metric == own.metric else mode_of(metric)))


def _check_validated(recipe: Recipe) -> None:
    data = recipe.data
    if data.validation is None and data.validation_fraction == 0 and sources.load(data).validation is None:
        raise ConfigError(
            "a search needs validation rows; give data.validation, or a data.validation_fraction above 0"
        )
    tasks.get(recipe.task)


def _why_apart(recipe: Recipe, space: Space) -> str | None:
    """Why the trials of a space around this recipe cannot share a base; None if they can."""
    apart = [name for name, d in space.dimensions.items() if d.kind != "value" and not shared_fields(name)]
    if apart:
        return f"{listing(apart)} changes the base, the rows or how the base is computed"
    return why_alone(recipe)


def _announced(engine: str, config: SearchConfig, reason: str | None) -> str:
    if engine == "population":
        joint = "share one base in this process" if reason is None else "run in this process"
        return f"up to {config.trials} trials, {config.slots} at once, {joint}"
    several, shared = config.launch.processes, config.launch.engine
    if engine == "processes":
        return f"up to {config.trials} trials, one at a time, each in {several} processes ({shared})"
    where = f"processes of Ray on {config.address or 'this machine'}"
    if several is not None:
        where = where.replace("processes", f"{several} workers", 1)
        return f"up to {config.trials} trials, each in {where}"
    if reason is None:
        return f"up to {config.trials} trials, in {where}; those in one share a base"
    return f"up to {config.trials} trials, each by itself in {where}, because {reason}"


def longest(recipe: Recipe, space: Space) -> Recipe:
    """The trial with the most evaluations, among those with one field at an end of its range."""
    first = {name: d.samples()[0] for name, d in space.searched.items()}
    made = [
        space.recipe(recipe, {**first, name: value})
        for name, d in space.searched.items()
        for value in d.samples()
    ]
    return max(made, key=lambda each: evaluations(each) or math.inf)


def notes(recipe: Recipe, sampler: Sampler, config: SearchConfig) -> Iterator[str]:
    """Lines about surprises of this configuration."""
    if math.inf > sampler.size > config.trials:
        yield f"the grid has {sampler.size} combinations; the first {config.trials} are tried (trials)"
    there = evaluations(recipe)
    if config.scheduler == "asha" and there is not None and (config.max_t or 0) > there:
        yield (
            f"max_t is {config.max_t}, and a trial has {there} evaluations; rungs after them are never "
            "reached"
        )


def query_and_value(recipe: Recipe) -> tuple[str, str]:
    """Names of the query and value projections of a recipe's model.

    Raises:
        ConfigError: the model has no separate projections for them; the space must then name targets.
    """
    with quiet(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(resolve_model(recipe.model), trust_remote_code=False)
            model = AutoModel.from_config(config)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the configuration of {recipe.model!r}: {error}") from error
    leaves = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    found = next((pair for pair in _PAIRS if set(pair) <= leaves), None)
    if found is None:
        raise ConfigError(
            f"{recipe.model!r} has no query and value projections of their own, which the default space "
            f"targets; give a space, with method.target_modules among {', '.join(sorted(leaves))}"
        )
    return found
