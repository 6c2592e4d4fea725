"""What Ray Tune asks and tells while it runs a search: what is next, and what was reported."""

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
