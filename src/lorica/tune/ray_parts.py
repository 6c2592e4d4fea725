"""What Ray Tune asks while it runs a search: which trial is next, and whether one goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher


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
        """Nothing: the rule hears of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the search's own journal is what it resumes from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Rule(FIFOScheduler):
    """Asks a function whether a trial ends with what it reports.

    Args:
        reported: name and result → whether it ends.
        died: told the name of a trial that Ray gave up.
    """

    def __init__(
        self, reported: Callable[[str, Mapping[str, Any]], bool], died: Callable[[str], None]
    ) -> None:
        """Keep the functions."""
        super().__init__()
        self._reported, self._died = reported, died

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on, or stop."""
        ends = self._reported(trial.config["name"], result)
        return TrialScheduler.STOP if ends else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass it on."""
        self._died(trial.config["name"])

    def __getstate__(self) -> dict[str, Any]:
        return {}
