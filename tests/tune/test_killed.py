from __future__ import annotations

import signal
from pathlib import Path

from ranks import started
from tune.killed import kills_and_resumes


def test_a_population_that_was_killed_anywhere_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    ended = started(kills_and_resumes, str(tmp_path), world=None).wait()[0]
    assert ended.code == 0, ended.output
    assert ended.value == {name: [-signal.SIGKILL, 0, True] for name in ended.value}, ended.output
    assert len(ended.value) == 4
