from __future__ import annotations

import io
import logging
import threading
import warnings

import datasets
import pytest
import transformers
from rich.console import Console
from waiting import PATIENCE

from lorica.train import console as module
from lorica.train.console import duration, make_console, print_table, quiet, scores, size, waiting


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3661, "1:01:01")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1_380_472, "1.4 MB"), (90_883_328, "90.9 MB"), (5e12, "5000.0 GB")],
)
def test_sizes(count: float, shown: str) -> None:
    assert size(count) == shown


def test_scores_are_shares_but_for_the_loss() -> None:
    assert scores({"loss": 0.25, "accuracy": 0.875}) == [("loss", "0.2500"), ("accuracy", "87.50%")]


def test_tables_are_plain_in_a_pipe() -> None:
    output = io.StringIO()
    print_table(Console(file=output, width=80), "of [things]", ["name", "count"], [["a", "1"]])
    assert "of [things]" in output.getvalue()
    assert "\x1b" not in output.getvalue()
    assert make_console().width == 200


def test_quiet_gives_the_voice_back() -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled(), datasets.utils.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet():  # noqa: PT012
        assert log.get_verbosity() == logging.ERROR
        assert not log.is_progress_bar_enabled()
        assert not datasets.utils.is_progress_bar_enabled()
        warnings.warn("'pin_memory' argument is set", stacklevel=1)
        raise RuntimeError
    assert (
        log.get_verbosity(),
        log.is_progress_bar_enabled(),
        datasets.utils.is_progress_bar_enabled(),
    ) == before


def test_it_says_at_once_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.01)
    told, again = io.StringIO(), threading.Event()

    class Heard(Console):
        def print(self, *args: object, **options: object) -> None:  # type: ignore[override]
            super().print(*args, **options)  # type: ignore[arg-type]
            if told.getvalue().count("\n") >= 2:
                again.set()

    with waiting(Heard(file=told, width=100), "reading [rows].csv"):
        assert told.getvalue() == "reading [rows].csv\n"
        assert again.wait(PATIENCE)
    assert told.getvalue().splitlines()[1] == "reading [rows].csv (0:00)"
    before = told.getvalue()
    threading.Event().wait(0.05)
    assert told.getvalue() == before


def test_on_a_terminal_it_is_one_line() -> None:
    told = io.StringIO()
    with waiting(Console(file=told, force_terminal=True, width=100), "reading rows.csv"):
        pass
    assert "reading rows.csv" in told.getvalue()


def test_nobody_listens() -> None:
    with waiting(None, "reading rows.csv"):
        pass
