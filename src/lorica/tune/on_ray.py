"""Trials in processes of Ray Tune, on this machine or a cluster; each process trains a population if it can.

Ray starts and watches the processes, assigns processors and GPUs, and restarts processes that died. The
calling process chooses the trials, ends them early and keeps the journal, as for a population. Where a trial
is to have several processes, the one of Ray Tune's has workers of Ray Train's for them, and passes on what
they say.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.errors import LoricaError, require
from lorica.train.console import quiet
from lorica.train.distributed.cluster import connected
from lorica.train.distributed.group import on_cpu
from lorica.train.recipe import Recipe
from lorica.tune.journal import ENDED, JOURNAL, TRIALS, Journal, Record
from lorica.tune.population.shared_base import SharedBase
from lorica.tune.progress import ProgressTable
from lorica.tune.schedulers import Goal

if TYPE_CHECKING:
    from lorica.tune.settings import SearchConfig

import yaml
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from lorica.tune.in_processes import ApartSearch, ProcessRunner
from lorica.tune.journal import Status
from lorica.tune.population.population import TrialRunner


class RaySearch(ApartSearch):
    """Runs trials under Ray Tune.

    Args:
        source: names and recipes of the trials.
        recipe: the fields that they share.
        directory: the search's folder.
        config: the search's settings.
        count: maximum number of trials.
        joint: whether the trials of a process share a base and are trained together.
        options: of `ApartSearch`.
    """

    def __init__(
        self,
        source: Iterator[tuple[str, Recipe]],
        recipe: Recipe,
        directory: Path,
        config: SearchConfig,
        *,
        count: int,
        joint: bool,
        **options: Any,
    ) -> None:
        """Keep the arguments; nothing starts yet.

        Raises:
            MissingExtra: Ray is not installed.
        """
        require("ray.tune", extra="tune")
        if config.launch.processes is not None:
            require("ray.train", extra="ray")
        super().__init__(source, directory, config, **options)
        self._recipe, self._joint = recipe, joint
        self._slots = min(config.slots, count)

    def run(self, ends: float = math.inf) -> list[Record]:
        """Train until no trials are left, or until `ends` on the monotonic clock.

        Raises:
            LoricaError: Ray cannot be started or reached.
        """
        from ray import tune

        from lorica.tune.on_ray import Listener, NextTrial

        config = self._config
        budget = None if ends == math.inf else max(ends - time.monotonic(), 1.0)
        with _ray(config.address, self._progress), self._progress, quiet():
            size = 1
            places = {"directory": str(self._directory.resolve()), "here": str(Path.cwd())}
            if config.launch.processes is None:
                resources = config.resources or {"cpu": 1}
                size = math.ceil(self._slots / max(_room(resources), 1)) if self._joint else 1
                if size > 1:
                    self._progress.note(f"{size} trials together in each process")
                at_once = math.ceil(self._slots / size)
                work = tune.with_parameters(train_trials, base=self._base(), **places)
            else:
                needs, at_once = self._workers(config.launch.processes)
                resources = {"cpu": 0.0, "memory": 1.0}  # it waits; something must be reserved
                work = tune.with_parameters(train_by_workers, config=config, needs=needs, **places)
            tuner = tune.Tuner(
                tune.with_resources(work, resources),
                tune_config=tune.TuneConfig(
                    num_samples=config.trials,
                    search_alg=NextTrial(lambda: self._next(size)),
                    scheduler=Listener(self._reported, self._died),
                    max_concurrent_trials=at_once,
                    time_budget_s=budget,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="ray",
                    storage_path=str(self._directory.resolve()),
                    failure_config=tune.FailureConfig(max_failures=config.retries),
                    verbose=0,
                ),
            )
            tuner.fit()
        return list(self.journal.records.values())

    def _workers(self, processes: int) -> tuple[dict[str, float], int]:
        """The resources of each worker of a trial, by Ray's names, and the number of trials with room.

        Raises:
            LoricaError: there is no room for one, in a Ray that was started here and so will not grow.
        """
        cpu = on_cpu() or bool(self._recipe.training.arguments.get("use_cpu"))
        needs = self._config.resources or ({"cpu": 1} if cpu else {"cpu": 1, "gpu": 1})
        fits = _room(needs, processes)
        if fits == 0 and self._config.address is None:
            raise LoricaError(
                f"a trial of {processes} workers needs {processes} times {dict(needs)}, and Ray has not as "
                "much here; take a smaller --launch.processes or --resources, or a cluster by --address"
            )
        at_once = max(min(fits, self._slots), 1)
        self._progress.note(f"{at_once} trial{'s' if at_once > 1 else ''} of {processes} workers at once")
        return {_NAMES.get(name, name): need for name, need in needs.items()}, at_once

    def _base(self) -> tuple[Any, ...] | None:
        """Rows and weights for all trials on the recipe's base; None unless they are plain and frozen."""
        if self._recipe.quantization is not None:
            return None
        base = SharedBase(self._recipe)
        base.prepared(self._recipe)
        return base.packed()

    def _next(self, size: int) -> dict[str, Any] | None:
        """The configuration of the next process; None when no trials are left."""
        trials = []
        for name, recipe in self._source:
            if self._controller.trial_created(name, recipe, self._values(name, recipe)).status not in ENDED:
                trials.append([name, recipe.to_yaml()])
            if len(trials) == size:
                break
        return {"trials": trials} if trials else None

    def _reported(self, result: Mapping[str, Any]) -> None:
        """Write a trial's report into the journal, and decide; its process reads the decision there."""
        if "said" not in result:  # Ray's own report at the end of a process
            return
        said = json.loads(result["said"])
        trial, kind = said.pop("trial"), said.pop("kind")
        if self.journal.record(trial).status in ENDED:  # that it left is known
            return
        if kind != "evaluation":
            self._on_end(self._controller.trial_ended(trial, kind, **said))
            return
        self._controller.trial_started(trial)
        try:
            if self._controller.trial_evaluated(trial, self._goal, **said):
                self._on_end(self._controller.trial_ended(trial, "stopped"))
        except LoricaError as error:
            self._on_end(
                self._controller.trial_ended(trial, "failed", error=f"{type(error).__name__}: {error}")
            )

    def _died(self, config: Mapping[str, Any]) -> None:
        """Record the failure of a process that died too often."""
        for trial, _ in config["trials"]:
            if self.journal.record(trial).status not in ENDED:
                folder = self._directory / TRIALS / trial
                error = f"its process died {self._config.retries + 1} times; see {folder}"
                self._on_end(self._controller.trial_ended(trial, "failed", error=error))


_NAMES = {"cpu": "CPU", "gpu": "GPU"}
"""Resource → Ray's own name of it."""


def _room(resources: Mapping[str, float], together: int = 1) -> int:
    """Number of processes with these resources that fit into Ray at once, or of so many together."""
    import ray

    there = ray.cluster_resources()
    room = [
        there.get(_NAMES.get(name, name), 0) / (need * together)
        for name, need in resources.items()
        if need > 0
    ]
    return int(min(room, default=1))


@contextlib.contextmanager
def _ray(address: str | None, progress: ProgressTable) -> Iterator[None]:
    """Ray for the length of a block, as Tune is to be used here."""
    # Otherwise Tune writes curves and results beside ours, and handles Ctrl-C itself.
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with connected(address, progress.note):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class NextTrial(Searcher):
    """Takes trials from a function; None ends the search."""

    def __init__(self, make: Callable[[], dict[str, Any] | None]) -> None:
        """Keep the function."""
        super().__init__()
        self._make = make

    def suggest(self, trial_id: str) -> Any:
        """The next trial."""
        made = self._make()
        return Searcher.FINISHED if made is None else made

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing: `Listener` handles reports."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the search resumes from its own journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, for the same reason."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Listener(FIFOScheduler):
    """Passes on the reports of trials, which end themselves when they must.

    Args:
        reported: called with a trial's report before the report returns in its process.
        died: called with the configuration of a trial that Ray gave up.
    """

    def __init__(
        self, reported: Callable[[Mapping[str, Any]], None], died: Callable[[Mapping[str, Any]], None]
    ) -> None:
        """Keep the functions."""
        super().__init__()
        self._reported, self._died = reported, died

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Pass the report on, and let the trial continue."""
        self._reported(result)
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass the death on, unless Ray is about to restart the trial."""
        if not trial.should_recover():
            self._died(trial.config)

    def __getstate__(self) -> dict[str, Any]:
        return {}


_BASES: dict[str, SharedBase] = {}
"""Bases that this process has opened; Ray runs several trials in one process, one after another."""


def train_trials(config: Mapping[str, Any], *, base: Any, directory: str, here: str) -> None:
    """Train a process's trials, from their newest checkpoints if they began before.

    A trial's own error is reported, not raised: Ray would take it for a dead process and try again.

    Args:
        config: ``trials``, each with its name and its recipe as YAML.
        base: the base of the search's recipe from Ray's object store; None if each trial loads its own.
        directory: the search's folder, reachable from every machine.
        here: the folder that the recipes' paths start from; Ray begins in one of its own.
    """
    if Path(here).is_dir():
        os.chdir(here)
    folder = Path(directory)
    # The search made these recipes from one that its user trusts.
    trials = [
        (name, Recipe.from_dict(yaml.safe_load(text), trust_task=True)) for name, text in config["trials"]
    ]
    runner = TrialRunner(
        _Remote(folder / JOURNAL),
        lambda name: folder / TRIALS / name,
        slots=len(trials),
        base=None if base is None else _base(base),
        resume=True,
    )
    runner.run(iter(trials))


def train_by_workers(
    given: Mapping[str, Any], *, config: SearchConfig, needs: Mapping[str, float], directory: str, here: str
) -> None:
    """Train a process's trial by workers of Ray Train's, from its newest checkpoint if it began before.

    Args:
        given: ``trials``, with its name and its recipe as YAML.
        config: the search's settings.
        needs: resources of each worker, by Ray's names.
        directory: the search's folder, reachable from every machine.
        here: as in `train_trials`.
    """
    import ray

    from lorica.train.ray.workers import in_workers

    assert config.launch.processes is not None
    if Path(here).is_dir():
        os.chdir(here)
    folder = Path(directory)
    [(name, text)] = given["trials"]
    recipe = Recipe.from_dict(yaml.safe_load(text), trust_task=True)  # made from one that its user trusts
    own = folder / TRIALS / name
    start = partial(
        in_workers, processes=config.launch.processes, resources=needs, storage=own / "checkpoints"
    )
    ProcessRunner(
        _Remote(folder / JOURNAL),
        lambda name: own,
        lambda work, args, hint: start(work, args),
        engine="ddp" if config.launch.engine == "ray" else config.launch.engine,
        retries=config.retries,
        host=ray.util.get_node_ip_address(),
    ).run(iter([(name, recipe)]))


class _Remote:
    """A proxy of the `TrialController` in the process that searches."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal

    def trial_created(self, name: str, recipe: Recipe, values: Mapping[str, object]) -> Record:
        """The trial's record; the trial may have ended before this process replaced one that died."""
        return Journal(self._journal, mend=False).record(name)

    def trial_started(self, name: str) -> None:
        """Do nothing: the first evaluation reports it."""

    def goal_of(self, recipe: Recipe) -> Goal:
        """The recipe's own goal; the searching process decides by the search's."""
        return Goal.of(recipe)

    def trial_evaluated(
        self, name: str, goal: Goal, metrics: Mapping[str, float], step: int, epoch: float, seconds: float
    ) -> bool:
        """Report an evaluation, and read the decision."""
        _say(name, "evaluation", metrics=dict(metrics), step=step, epoch=epoch, seconds=seconds)
        return Journal(self._journal, mend=False).record(name).status in ENDED

    def trial_ended(self, name: str, status: Status, **more: object) -> Record:
        """Report the end of a trial."""
        _say(name, status, **more)
        return Journal(self._journal, mend=False).record(name)


def _say(name: str, kind: str, **more: object) -> None:
    from ray import tune

    # As one string: Ray flattens what is nested, and joins names by slashes.
    tune.report({"said": json.dumps({"trial": name, "kind": kind, **more})})


def _base(packed: tuple[Any, ...]) -> SharedBase:
    key = packed[0]
    if key not in _BASES:
        _BASES.clear()
        _BASES[key] = SharedBase.unpacked(packed)
    return _BASES[key]
