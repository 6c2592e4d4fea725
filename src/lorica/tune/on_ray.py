"""Trials in processes of Ray Tune's, on this machine or a cluster; a population in each if they can be joint.

Ray starts and watches the processes, hands out processors and GPUs, and starts again what died. Where to
search, who leaves and what is written down is decided here, in the process that called, as for a population.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorica.errors import ConfigError, LoricaError, require
from lorica.train.console import quiet
from lorica.train.recipe import Recipe
from lorica.tune.journal import ENDED, JOURNAL, TRIALS, Journal, Record
from lorica.tune.population.shared_base import SharedBase
from lorica.tune.progress import ProgressTable
from lorica.tune.schedulers import Goal, Scheduler, TrialController

if TYPE_CHECKING:
    from lorica.tune.settings import SearchConfig

import yaml
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from lorica.tune.journal import Status
from lorica.tune.population.population import TrialRunner


class RaySearch:
    """Runs trials under Ray Tune.

    Args:
        source: names and recipes.
        recipe: what they have in common.
        directory: of the search.
        config: of the search.
        count: trials that there will be, at most.
        joint: whether those in one process share a base and are trained together.
        scheduler: as of `Population`, and what follows.
        goal: metric that decides.
        values: trial and recipe → what distinguishes it.
        console: where to show progress.
        on_end: called with a trial's record when it ends.
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
        scheduler: Scheduler,
        goal: Goal,
        values: Callable[[str, Recipe], Mapping[str, Any]],
        console: Console,
        on_end: Callable[[Record], None],
    ) -> None:
        """Nothing is started yet.

        Raises:
            MissingExtra: Ray is not installed.
        """
        require("ray.tune", extra="tune")
        self.journal = Journal(directory / JOURNAL)
        self._source, self._recipe, self._config = source, recipe, config
        self._directory, self._values, self._on_end = directory, values, on_end
        self._progress = ProgressTable(console)
        self._controller = TrialController(self.journal, scheduler, goal, self._progress.show)
        self._goal, self._joint = goal, joint
        self._slots = min(config.slots, count)

    def run(self, ends: float = math.inf) -> list[Record]:
        """Train until there are no more trials, or until `ends` on the monotonic clock.

        Raises:
            LoricaError: Ray cannot be started or reached.
        """
        from ray import tune

        from lorica.tune.on_ray import Listener, NextTrial

        config = self._config
        budget = None if ends == math.inf else max(ends - time.monotonic(), 1.0)
        with _ray(config.address, self._progress), self._progress, quiet():
            resources = config.resources or {"cpu": 1}
            size = math.ceil(self._slots / _processes(resources)) if self._joint else 1
            if size > 1:
                self._progress.note(f"{size} trials together in each process")
            trainable = tune.with_resources(
                tune.with_parameters(
                    train_trials, base=self._base(), directory=str(self._directory.resolve())
                ),
                resources,
            )
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    num_samples=config.trials,
                    search_alg=NextTrial(lambda: self._next(size)),
                    scheduler=Listener(self._reported, self._died),
                    max_concurrent_trials=math.ceil(self._slots / size),
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

    def _base(self) -> tuple[Any, ...] | None:
        """Rows and weights for all trials on the recipe's base; None where it is not frozen plain tensors."""
        if self._recipe.quantization is not None:
            return None
        base = SharedBase(self._recipe)
        base.prepared(self._recipe)
        return base.packed()

    def _next(self, size: int) -> dict[str, Any] | None:
        """What the next process trains; None when there is nothing more."""
        trials = []
        for name, recipe in self._source:
            if self._controller.trial_created(name, recipe, self._values(name, recipe)).status not in ENDED:
                trials.append([name, recipe.to_yaml()])
            if len(trials) == size:
                break
        return {"trials": trials} if trials else None

    def _reported(self, result: Mapping[str, Any]) -> None:
        """Write down what became of a trial, and decide; its process reads there whether it goes on."""
        if "said" not in result:  # Ray's own, at the end of a process's work
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
        """A process died more often than it may."""
        for trial, _ in config["trials"]:
            if self.journal.record(trial).status not in ENDED:
                folder = self._directory / TRIALS / trial
                error = f"its process died {self._config.retries + 1} times; see {folder}"
                self._on_end(self._controller.trial_ended(trial, "failed", error=error))


def _processes(resources: Mapping[str, float]) -> int:
    """How many processes with these resources Ray has room for at once."""
    import ray

    there = ray.cluster_resources()
    names = {"cpu": "CPU", "gpu": "GPU"}
    room = [there.get(names.get(name, name), 0) / need for name, need in resources.items() if need > 0]
    return max(int(min(room, default=1)), 1)


@contextlib.contextmanager
def _ray(address: str | None, progress: ProgressTable) -> Iterator[None]:
    """Ray, started here or reached where it runs; one that was running already is left running."""
    import ray

    # Tune writes curves and results of its own beside ours otherwise, and takes Ctrl-C for itself.
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    ours = not ray.is_initialized()
    try:
        if ours:
            options: dict[str, Any] = {} if address else {"include_dashboard": False}
            try:
                ray.init(
                    address=address,
                    log_to_driver=False,
                    configure_logging=True,
                    logging_level=logging.ERROR,
                    **options,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                where = f"Ray at {address!r} cannot be reached" if address else "Ray cannot be started here"
                raise LoricaError(f"{where}: {error}") from error
        elif address is not None:
            raise ConfigError(f"Ray runs in this process already, so {address!r} cannot be joined")
        resources = ray.cluster_resources()
        progress.note(f"Ray: {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs")
        yield
    finally:
        if ours:
            ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class NextTrial(Searcher):
    """Hands out trials from a function that makes them; None ends the search."""

    def __init__(self, make: Callable[[], dict[str, Any] | None]) -> None:
        """Keep the function."""
        super().__init__()
        self._make = make

    def suggest(self, trial_id: str) -> Any:
        """The next trial."""
        made = self._make()
        return Searcher.FINISHED if made is None else made

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the listener hears of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the search's own journal is what it resumes from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Listener(FIFOScheduler):
    """Passes on what trials report; each sees to it itself that what should end does.

    Args:
        reported: told what a trial reports, before the report returns in its process.
        died: told the configuration of a trial that Ray gave up.
    """

    def __init__(
        self, reported: Callable[[Mapping[str, Any]], None], died: Callable[[Mapping[str, Any]], None]
    ) -> None:
        """Keep the functions."""
        super().__init__()
        self._reported, self._died = reported, died

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Listen, and let it go on."""
        self._reported(result)
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass it on, unless Ray, which tells of every death, is about to take the trial up again."""
        if not trial.should_recover():
            self._died(trial.config)

    def __getstate__(self) -> dict[str, Any]:
        return {}


_BASES: dict[str, SharedBase] = {}
"""Bases that this process has opened: Ray gives it one trial of its own after another."""


def train_trials(config: Mapping[str, Any], *, base: Any, directory: str) -> None:
    """Train, from the newest checkpoints where the trials were begun before.

    An error of a trial's own is reported, not raised: to Ray it would look as if the process had died, and
    be worth another try.

    Args:
        config: ``trials``, each with its name and its recipe as YAML.
        base: of the search's recipe, from Ray's object store; None where each trial loads its own.
        directory: the search's folder, reached by every machine.
    """
    folder = Path(directory)
    # The search made them, of a recipe that its user trusts.
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


class _Remote:
    """A proxy of the `TrialController` in the process that searches."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal

    def trial_created(self, name: str, recipe: Recipe, values: Mapping[str, object]) -> Record:
        """What is known of a trial: it may have ended before this process took over from one that died."""
        return Journal(self._journal, mend=False).record(name)

    def trial_started(self, name: str) -> None:
        """Nothing: its first evaluation says so."""

    def goal_of(self, recipe: Recipe) -> Goal:
        """The recipe's own; what counts is decided elsewhere."""
        return Goal.of(recipe)

    def trial_evaluated(
        self, name: str, goal: Goal, metrics: Mapping[str, float], step: int, epoch: float, seconds: float
    ) -> bool:
        """Report it, and read what was decided."""
        _say(name, "evaluation", metrics=dict(metrics), step=step, epoch=epoch, seconds=seconds)
        return Journal(self._journal, mend=False).record(name).status in ENDED

    def trial_ended(self, name: str, status: Status, **more: object) -> Record:
        """Report it."""
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
