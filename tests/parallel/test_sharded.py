"""What a sharded model does beside training: files into it, and what it refuses on all of its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel import work
from ranks import on_ranks
from torch import nn

import lorica
from lorica import parallel
from lorica.errors import StateError

pytest.importorskip("transformers")


def test_what_needs_whole_weights_is_refused_on_every_rank(tmp_path: Path) -> None:
    first, second = on_ranks(work.refused, str(tmp_path))
    for said in (first, second):
        assert "sharded" in said["merge"]
        assert "lorica merge BASE ADAPTER -o MERGED --stream" in said["merge"]
        assert "lorica merge BASE ADAPTER" in said["switch"]
        assert "lorica.extract" in said["delta weight"]
        assert "lorica.disabled" in said["detach"]
        for what in ("adapt", "adapt biases", "attach"):
            assert "is already sharded; adapt the model before fully_shard" in said[what]
        assert "nf4 or fp4" in said["int8"]
        assert "was sharded before" in said["shard again"]
        assert "carries no adapter" in said["not adapted"]
        assert "LlamaDecoderLayr" in said["no such block"]
        assert said["a file in the way"].startswith("FileError")
        assert "shape of" in said["another make"]
    assert "rank 0 could not write" in second["a file in the way"]


def test_adapting_after_wrapping_says_what_to_do_first() -> None:
    for said in on_ranks(work.after_wrapping):
        assert "put the adapter on first, then wrap" in said["ddp"]
        assert "put the adapter on first, then wrap" in said["inside ddp"]
        assert "split over ranks (tensor parallel" in said["tensor parallel"]
        assert "lorica.parallel.split" in said["tensor parallel"]


def test_ranks_that_train_different_adapters_are_told() -> None:
    for rank, (apart, together, rows) in enumerate(on_ranks(work.adapters_apart)):
        assert f"on rank {rank} '{['default', 'second'][rank]}' trains" in apart
        assert together == ""
        assert "something else" in rows
    for (apart,) in on_ranks(work.by_hand):
        assert "something else" in apart


def test_a_file_is_loaded_into_a_sharded_model(tmp_path: Path) -> None:
    for found in on_ranks(work.loaded, str(tmp_path)):
        for name, (values, outputs) in found.items():
            assert values == 0.0, name
            assert outputs == pytest.approx(0.0, abs=1e-6), name


def test_sharding_needs_a_group() -> None:
    model = lorica.adapt(nn.Sequential(nn.Linear(4, 4)), lorica.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(StateError, match="start the script with torchrun"):
        parallel.shard(model)


def test_a_run_goes_on_from_its_checkpoint_on_any_number_of_ranks(tmp_path: Path) -> None:
    for found in on_ranks(work.goes_on, str(tmp_path)):
        assert found["apart"] == 0.0
        assert "holds no checkpoint" in found["none"]
        assert found["another"].startswith("AdapterError")
    model = work.build(work.CASES["token rows"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "adapter"}
    parallel.load_checkpoint(model, optimizer, tmp_path / "2")
    saved = lorica.read(tmp_path / "adapter").named_tensors()
    assert all(torch.equal(saved[key], value) for key, value in lorica.extract(model).named_tensors().items())
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_ways_of_sharding() -> None:
    for found in on_ranks(work.settings):
        for way, difference in found.items():
            half = way in ("bfloat16", "a policy")
            assert (0 < difference < 0.1) if half else difference == 0.0, way
