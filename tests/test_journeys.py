"""The README's journeys stay short: a feature does not lengthen the walk of whoever does not use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "journeys.py"

# Files that each visits at most, on a model of one linear layer.
MOST = {"adapt": 13, "load": 15, "save": 10, "merge": 10, "detach": 6, "forward": 4, "active": 3}


def test_each_journey_visits_few_files() -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "--no-train"], capture_output=True, text=True, check=True
    ).stdout
    visited = {row[0]: int(row[1]) for row in map(str.split, done.splitlines()[1:])}
    assert {name: visited[name] for name in MOST if visited[name] > MOST[name]} == {}


def test_no_room_is_too_large_and_no_two_files_need_each_other() -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "--sizes"], capture_output=True, text=True, check=True
    ).stdout
    said = dict(line.split(": ", 1) for line in done.splitlines() if ": " in line)
    assert int(said["longest file"].split()[-2]) <= 450
    assert int(said["widest folder"].split()[-2]) <= 15
    assert said["circle of imports"] == "none"
