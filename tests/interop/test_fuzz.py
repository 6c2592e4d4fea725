"""Random lives of adapters with PEFT and with `lorica.peft`; ``LORICA_EXPLORE=1`` goes on for an hour."""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest
from differential import Life, Pair, told

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.no_cover]

CASES, HOUR = 60, 3600.0


def test_the_same_life_with_both() -> None:
    lives: list[Life] = []
    if os.environ.get("LORICA_EXPLORE"):
        seed, until = time.time_ns() % 10**9, time.monotonic() + float(os.environ.get("LORICA_SECONDS", HOUR))
        while time.monotonic() < until:
            lives.append(Pair(seed + len(lives), peft).run(8))
        print(told(lives))
    else:
        lives += (Pair(seed, peft).run(6) for seed in range(CASES))
    total: Counter[str] = sum((life.counted for life in lives), start=Counter())
    # Most of it must run, or the comparison would prove nothing.
    assert total["checked"] > 3 * len(lives), told(lives)
    assert all(total[verb] for verb in ("exchanged", "unloaded", "combine", "merge")), told(lives)
