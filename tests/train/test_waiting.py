from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from lorica.train import console as module
from lorica.train.console import waiting


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
        assert again.wait(60)
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
