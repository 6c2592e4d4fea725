"""The README's journeys stay short: a feature does not lengthen the walk of whoever does not use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Files that each visits at most, on a model of one linear layer.
MOST = {"adapt": 13, "load": 15, "save": 10, "merge": 10, "detach": 6, "forward": 4, "active": 3}


def test_each_journey_visits_few_files() -> None:
    tool = Path(__file__).parents[1] / "tools" / "journeys.py"
    done = subprocess.run(
        [sys.executable, tool, "--no-train"], capture_output=True, text=True, check=True
    ).stdout
    visited = {row[0]: int(row[1]) for row in map(str.split, done.splitlines()[1:])}
    assert {name: visited[name] for name in MOST if visited[name] > MOST[name]} == {}
