"""A run killed at any moment and resumed ends with the same file as one that was never interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes, and this system cannot fork")
def test_a_killed_run_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    program = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert len(outcome) == 10
    assert outcome == {name: [-9, 0, True] for name in outcome}, done.stderr
