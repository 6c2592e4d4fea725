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
from lorica.train.quiet import quiet
from lorica.train.recipe import Recipe
from lorica.tune.base import SharedBase
from lorica.tune.board import Board
from lorica.tune.halving import Scheduler
from lorica.tune.journal import ENDED, Journal, Record
from lorica.tune.population import JOURNAL, TRIALS
from lorica.tune.ray_trial import train_trials
from lorica.tune.referee import Goal, Referee

if TYPE_CHECKING:
    from lorica.tune.settings import SearchConfig


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
        told: called with a trial's record when it ends.
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
        told: Callable[[Record], None],
    ) -> None:
        """Nothing is started yet.

        Raises:
            MissingExtra: Ray is not installed.
        """
        require("ray.tune", extra="tune")
        self.journal = Journal(directory / JOURNAL)
        self._source, self._recipe, self._config = source, recipe, config
        self._directory, self._values, self._told = directory, values, told
        self._board = Board(console)
        self._referee = Referee(self.journal, scheduler, goal, self._board.show)
        self._goal, self._joint = goal, joint
        self._slots = min(config.slots, count)

    def run(self, ends: float = math.inf) -> list[Record]:
        """Train until there are no more trials, or until `ends` on the monotonic clock.

        Raises:
            LoricaError: Ray cannot be started or reached.
        """
        from ray import tune

        from lorica.tune.ray_parts import Listener, NextTrial

        config = self._config
        budget = None if ends == math.inf else max(ends - time.monotonic(), 1.0)
        with _ray(config.address, self._board), self._board, quiet():
            resources = config.resources or {"cpu": 1}
            size = math.ceil(self._slots / _processes(resources)) if self._joint else 1
            if size > 1:
                self._board.note(f"{size} trials together in each process")
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
        return base.shipped()

    def _next(self, size: int) -> dict[str, Any] | None:
        """What the next process trains; None when there is nothing more."""
        trials = []
        for name, recipe in self._source:
            if self._referee.begins(name, recipe, self._values(name, recipe)).status not in ENDED:
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
            self._told(self._referee.ends(trial, kind, **said))
            return
        self._referee.runs(trial)
        try:
            if self._referee.evaluated(trial, self._goal, **said):
                self._told(self._referee.ends(trial, "stopped"))
        except LoricaError as error:
            self._told(self._referee.ends(trial, "failed", error=f"{type(error).__name__}: {error}"))

    def _died(self, config: Mapping[str, Any]) -> None:
        """A process died more often than it may."""
        for trial, _ in config["trials"]:
            if self.journal.record(trial).status not in ENDED:
                folder = self._directory / TRIALS / trial
                error = f"its process died {self._config.retries + 1} times; see {folder}"
                self._told(self._referee.ends(trial, "failed", error=error))


def _processes(resources: Mapping[str, float]) -> int:
    """How many processes with these resources Ray has room for at once."""
    import ray

    there = ray.cluster_resources()
    names = {"cpu": "CPU", "gpu": "GPU"}
    room = [there.get(names.get(name, name), 0) / need for name, need in resources.items() if need > 0]
    return max(int(min(room, default=1)), 1)


@contextlib.contextmanager
def _ray(address: str | None, board: Board) -> Iterator[None]:
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
        board.note(f"Ray: {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs")
        yield
    finally:
        if ours:
            ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
