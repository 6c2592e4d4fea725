from __future__ import annotations

import json
from pathlib import Path

from lorica.train import last_checkpoint
from lorica.train.trainer.checkpoints import discard_incomplete, find_best, is_complete


def checkpoint(folder: Path, step: int, *, state: str | None = None, without: str = "") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
        if name != without:
            (path / name).write_text("")
    if without != "trainer_state.json":
        (path / "trainer_state.json").write_text(
            json.dumps({"global_step": step}) if state is None else state
        )
    return path


def test_the_newest_whole_one(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, without="trainer_state.json")
    checkpoint(tmp_path, 12, state='{"global_step": ')
    checkpoint(tmp_path, 13, state='{"global_step": 5}')
    checkpoint(tmp_path, 14, without="adapter_model.safetensors")
    checkpoint(tmp_path, 15, without="optimizer.pt")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert last_checkpoint(tmp_path) == newest
    assert {path.name for path in discard_incomplete(tmp_path)} == {f"checkpoint-{i}" for i in range(11, 16)}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-99",
        "checkpoint-best",
    ]


def test_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    assert not is_complete(tmp_path)


def test_the_best_is_found_again_after_a_move(tmp_path: Path) -> None:
    best = checkpoint(tmp_path / "new", 5)
    state = json.dumps({"global_step": 10, "best_model_checkpoint": str(tmp_path / "old" / "checkpoint-5")})
    last = checkpoint(tmp_path / "new", 10, state=state)
    find_best(last)
    assert json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    find_best(best)
    assert json.loads((best / "trainer_state.json").read_text()) == {"global_step": 5}
