from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path


def test_a_population_that_was_killed_anywhere_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    program = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome == {name: [-signal.SIGKILL, 0, True] for name in outcome}
    assert len(outcome) == 4
