"""Each trial in a process of Ray Tune's, on this machine or a cluster.

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
from lorica.tune.ray_trial import train_trial
from lorica.tune.referee import Goal, Referee

if TYPE_CHECKING:
    from lorica.tune.settings import SearchConfig


class RaySearch:
    """Runs trials under Ray Tune. Arguments as of `Population`, and the search's configuration."""

    def __init__(
        self,
        source: Iterator[tuple[str, Recipe]],
        recipe: Recipe,
        directory: Path,
        config: SearchConfig,
        *,
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
        self._goal = goal

    def run(self, ends: float = math.inf) -> list[Record]:
        """Train until there are no more trials, or until `ends` on the monotonic clock.

        Raises:
            LoricaError: Ray cannot be started or reached.
        """
        from ray import tune

        from lorica.tune.ray_parts import NextTrial, Rule

        config = self._config
        budget = None if ends == math.inf else max(ends - time.monotonic(), 1.0)
        with _ray(config.address, self._board), self._board, quiet():
            options = config.resources or {"cpu": 1}
            trainable = tune.with_resources(
                tune.with_parameters(
                    train_trial, base=self._base(), directory=str((self._directory / TRIALS).resolve())
                ),
                options,
            )
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    num_samples=config.trials,
                    search_alg=NextTrial(self._next),
                    scheduler=Rule(self._result, self._died),
                    max_concurrent_trials=config.slots,
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

    def _next(self) -> dict[str, Any] | None:
        for name, recipe in self._source:
            if self._referee.begins(name, recipe, self._values(name, recipe)).status not in ENDED:
                return {"name": name, "recipe": recipe.to_yaml()}
        return None

    def _result(self, trial: str, result: Mapping[str, Any]) -> bool:
        """Write down what a trial reports; whether it ends with that."""
        if "said" not in result:  # Ray's own, at a trial's end
            return False
        said = json.loads(result["said"])
        kind = said.pop("kind")
        if kind != "evaluation":
            self._told(self._referee.ends(trial, kind, **said))
            return False
        self._referee.runs(trial)
        try:
            stops = self._referee.evaluated(trial, self._goal, **said)
        except LoricaError as error:
            self._told(self._referee.ends(trial, "failed", error=f"{type(error).__name__}: {error}"))
            return True
        if stops:
            self._told(self._referee.ends(trial, "stopped"))
        return stops

    def _died(self, trial: str) -> None:
        """A trial's process died more often than it may."""
        if self.journal.record(trial).status not in ENDED:
            error = (
                f"its process died {self._config.retries + 1} times; see {self._directory / TRIALS / trial}"
            )
            self._told(self._referee.ends(trial, "failed", error=error))


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
