"""Trials that each train in several processes: one at a time on this machine, or several at once by Ray.

    the process that searches                    the processes of a trial
    next trial ──────────── start ─────────────▶ lorica.train.train, as in `lorica train --launch.processes`
    scheduler, journal ◀─── an evaluation ────── the first of them says it, and waits
                       ──── whether it ends ───▶ all of them end it, or go on
    journal ◀────────────── how it ended ─────── whichever of them knows

What decides and writes is where it is for other trials; see `lorica.tune.schedulers.TrialController`.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from lorica.errors import ConfigError, StateError
from lorica.train import tasks
from lorica.train.console import quiet
from lorica.train.distributed.group import Lost, OnAnother, by_first, is_first
from lorica.train.distributed.launch import INTERRUPTED, check_room, launch
from lorica.train.recipe import Recipe
from lorica.train.run import make_room, train
from lorica.train.settings import LaunchConfig
from lorica.train.system import alone_in, writable_directory
from lorica.train.trainer.checkpoints import last_checkpoint
from lorica.train.trainer.fit import Interrupted
from lorica.tune.journal import ENDED, JOURNAL, TRIALS, Journal, Record
from lorica.tune.population.population import LOG, Controller, Reporter, TrialStopped
from lorica.tune.progress import ProgressTable
from lorica.tune.schedulers import Goal, Scheduler, TrialController
from lorica.tune.settings import SearchConfig
from lorica.tune.space import Space

_PATIENCE = 60.0
"""Seconds in which the processes of a search that was killed are gone from a trial's folder."""


def check_trials(recipe: Recipe, space: Space, launch: LaunchConfig, *, here: bool) -> None:
    """Refuse what cannot train in several processes, before anything starts.

    Args:
        recipe: a trial's.
        space: the searched fields.
        launch: the processes of a trial.
        here: whether they are this machine's.

    Raises:
        ConfigError: naming it.
    """
    assert launch.processes is not None
    where = "leave out launch.processes (--launch.processes)"
    if tasks.get(recipe.task).carrier is not None:
        raise ConfigError(f"the task {recipe.task} trains in one process; {where}")
    if recipe.training.auto_batch_size or "training.auto_batch_size" in space.dimensions:
        raise ConfigError(
            "training.auto_batch_size looks for a batch size in one process, and launch.processes asks for "
            f"{launch.processes} for each trial; give training.batch_size, of each process, or {where}"
        )
    if here:
        check_room(launch.processes)


class Line(NamedTuple):
    """The way from a trial's processes to the one that waits for them.

    Args:
        address: where that one listens.
        key: that both of them know.
    """

    address: Any
    key: bytes

    def say(self, kind: str, **said: Any) -> bool:
        """Say something, and wait for the answer: whether the trial must end."""
        with Client(self.address, authkey=self.key) as there:
            there.send_bytes(json.dumps({"kind": kind, **said}).encode())
            return json.loads(there.recv_bytes())


def train_trial(line: Line, recipe: Recipe, engine: str) -> int:
    """The work of each process of a trial, from its newest checkpoint if it began before.

    Args:
        line: to the process that waits.
        recipe: the trial's, with its own folder as its output.
        engine: as in `train`.

    Returns:
        0 once it was said how the trial ended; another number where the process cannot tell.
    """

    def evaluated(metrics: Mapping[str, float], step: int, epoch: float, seconds: float) -> bool:
        said = {"metrics": dict(metrics), "step": step, "epoch": epoch, "seconds": seconds}
        return by_first(lambda: line.say("evaluation", **said))

    with contextlib.ExitStack() as stack:
        log = stack.enter_context((Path(recipe.output) / LOG).open("a", encoding="utf-8", buffering=1))
        # Whatever is printed would be among the lines of the search.
        for redirected in (quiet(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
            stack.enter_context(redirected)
        console = Console(file=log, width=200, no_color=True)
        said: dict[str, Any] = {"kind": "stopped"}
        try:
            result = train(
                recipe, resume=True, console=console, engine=engine, callbacks=[Reporter(evaluated)]
            )
            said = {"kind": "finished", "metrics": result.metrics}
        except TrialStopped:
            pass
        except (Interrupted, KeyboardInterrupt):
            return INTERRUPTED
        except (Lost, OnAnother):
            return 1
        except Exception as error:
            log.write("".join(traceback.format_exception(error)))
            line.say("failed", error=f"{type(error).__name__}: {error}")
            return 1
        if is_first():
            line.say(**said)
    return 0


@contextlib.contextmanager
def _listening(
    host: str | None, evaluated: Callable[..., bool]
) -> Iterator[tuple[Line, list[dict[str, Any]]]]:
    """Within it, a trial's processes are heard.

    Args:
        host: this machine's address for those on others. None hears those on this machine alone.
        evaluated: called with an evaluation; returns whether the trial must end.

    Yields:
        The line to this process, and a list that receives how the trial ended.
    """
    told: list[dict[str, Any]] = []
    key = secrets.token_bytes(32)
    with Listener(None if host is None else (host, 0), backlog=64, authkey=key) as listener:
        line = Line(listener.address, key)
        thread = threading.Thread(target=_listen, args=(listener, evaluated, told), daemon=True)
        thread.start()
        try:
            yield line, told
        finally:
            line.say("hung up")
            thread.join()


def _listen(listener: Listener, evaluated: Callable[..., bool], told: list[dict[str, Any]]) -> None:
    over = False
    while not over:
        # One that was killed, or does not know the key, is no reason not to hear the others.
        with contextlib.suppress(OSError, EOFError, AuthenticationError), listener.accept() as there:
            said = json.loads(there.recv_bytes())
            kind = said.pop("kind")
            stops = over = kind == "hung up"
            if kind == "evaluation":
                try:
                    stops = evaluated(**said)
                except Exception as error:
                    stops = True
                    told.append({"status": "failed", "error": f"{type(error).__name__}: {error}"})
            elif not over:
                told.append({"status": kind, **said})
            there.send_bytes(json.dumps(stops).encode())


class Start(Protocol):
    """Starts the processes of a trial and waits for them, as `launch` does."""

    def __call__(self, work: Callable[..., int], args: tuple[Any, ...], hint: str) -> int:
        """Call a function in all of them; returns 0, or the status of the first that failed."""
        ...


class ProcessRunner:
    """Trains recipes one after another, each in several processes.

    Args:
        controller: decides which trials end early, and keeps the journal.
        folder: trial → its own folder.
        start: starts a trial's processes.
        engine: as in `train`.
        retries: how often a trial's processes are started again after one was lost.
        host: this machine's address for processes on others. None where all are here.
        values: trial and recipe → its columns in tables.
        on_end: called with a trial's record when it ends.
    """

    def __init__(
        self,
        controller: Controller,
        folder: Callable[[str], Path],
        start: Start,
        *,
        engine: str,
        retries: int,
        host: str | None = None,
        values: Callable[[str, Recipe], Mapping[str, Any]] = lambda name, recipe: {},
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """Nothing starts yet."""
        self._controller, self._folder, self._start = controller, folder, start
        self._engine, self._retries, self._host = engine, retries, host
        self._values, self._on_end = values, on_end

    def run(self, source: Iterator[tuple[str, Recipe]], until: Callable[[], bool] = lambda: False) -> None:
        """Train all that the source gives.

        Args:
            source: names and recipes.
            until: asked before every trial; once it says so, no more is trained.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C; the trial under way has a checkpoint.
        """
        while not until() and (trial := next(source, None)) is not None:
            name, recipe = trial
            if self._controller.trial_created(name, recipe, self._values(name, recipe)).status in ENDED:
                continue
            ended = self._train(name, recipe, until)
            if ended is not None:
                self._on_end(self._controller.trial_ended(name, **ended))

    def _train(self, name: str, recipe: Recipe, until: Callable[[], bool]) -> dict[str, Any] | None:
        """The end of a trial; None where the search ended first."""
        folder = writable_directory(self._folder(name)).resolve()
        _clear_unless_begun(folder)
        self._controller.trial_started(name)
        evaluated = partial(self._controller.trial_evaluated, name, self._controller.goal_of(recipe))
        for _ in range(self._retries + 1):
            with _listening(self._host, evaluated) as (line, told):
                work = line, recipe.replace(output=str(folder)), self._engine
                code = self._start(train_trial, work, f"trial {name} goes on from its last checkpoint")
            if told:
                return told[0]
            if code == INTERRUPTED and until():
                return None
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if code == 128 + signal.SIGTERM:
                raise SystemExit(code)
        return {
            "status": "failed",
            "error": f"processes of it died {self._retries + 1} times; see {folder / LOG}",
        }


def _clear_unless_begun(folder: Path) -> None:
    """Take what another try left out of a trial's folder, unless it is a run that goes on."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            with alone_in(folder, "run"):
                begun = last_checkpoint(folder / "checkpoints") is not None
                make_room(folder, resume=begun, overwrite=not begun)
            return
        except StateError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


class ApartSearch:
    """A search whose trials train in other processes: its journal, and what decides in this one.

    Args:
        source: names and recipes of the trials.
        directory: the search's folder.
        config: the search's settings.
        scheduler: decides which trials end early.
        goal: the metric that decides.
        values: trial and recipe → the values that distinguish it.
        console: where to show progress.
        on_end: called with a trial's record when it ends.
    """

    def __init__(
        self,
        source: Iterator[tuple[str, Recipe]],
        directory: Path,
        config: SearchConfig,
        *,
        scheduler: Scheduler,
        goal: Goal,
        values: Callable[[str, Recipe], Mapping[str, Any]],
        console: Console,
        on_end: Callable[[Record], None],
    ) -> None:
        """Keep the arguments; nothing starts yet."""
        self.journal = Journal(directory / JOURNAL)
        self._source, self._directory, self._config = source, directory, config
        self._goal, self._values, self._on_end = goal, values, on_end
        self._progress = ProgressTable(console)
        self._controller = TrialController(self.journal, scheduler, goal, self._progress.show)


class ProcessSearch(ApartSearch):
    """Runs trials one at a time, each in several processes of this machine."""

    def run(self, ends: float = math.inf) -> list[Record]:
        """Train until no trials are left, or until `ends` on the monotonic clock."""
        config = self._config.launch

        def start(work: Callable[..., int], args: tuple[Any, ...], hint: str) -> int:
            left = None if ends == math.inf else ends - time.monotonic()
            return launch(work, args, config, hint, seconds=left)

        runner = ProcessRunner(
            self._controller,
            lambda name: self._directory / TRIALS / name,
            start,
            engine=config.engine,
            retries=self._config.retries,
            values=self._values,
            on_end=self._on_end,
        )
        with self._progress, quiet():
            runner.run(self._source, lambda: time.monotonic() > ends)
        return list(self.journal.records.values())
