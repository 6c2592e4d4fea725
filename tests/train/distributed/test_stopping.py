"""Runs of two processes that are stopped or lose one: what can be resumed comes to the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from ranks import on_ranks, started
from train.distributed import work


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return work.write_models(tmp_path_factory.mktemp("stopping"))


def test_interrupts_and_losses_change_no_bit(home: Path) -> None:
    first, second = on_ranks(work.stopped_and_resumed, str(home))
    assert first == second
    whole = first.pop("whole")
    assert first == {
        "the second alone": ("checkpoint-3", whole),
        "the first alone": ("checkpoint-4", whole),
        "one step apart": ("checkpoint-3", whole),
        "both, in the last step of a pass": ("checkpoint-5", whole),
    }
    for victim, engine in enumerate(("ddp", "fsdp2")):
        ended = started(work.killed, str(home), f"killed {victim}", victim, engine).wait(60)
        assert ended[victim].code == -signal.SIGKILL
        assert ended[1 - victim].code == 1
        assert "another process of this run was lost" in ended[1 - victim].output
        assert "--resume" in ended[1 - victim].output
        assert (home / f"killed {victim}" / "checkpoints" / "checkpoint-4").is_dir()
    again = on_ranks(work.resumed, str(home), {"killed 0": "ddp", "killed 1": "fsdp2"})
    assert again == [[whole, whole]] * 2
    assert on_ranks(work.stopped_in_parts, str(home)) == [dict.fromkeys(work.ENGINES, whole)] * 2
