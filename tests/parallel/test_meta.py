"""Models made on the meta device: filled, they are what a whole model is; never filled, they say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from parallel import bare
from ranks import on_ranks

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name in bare.CASES:
        bare.whole(name).save_pretrained(folder / name)
    return folder


def test_a_model_without_values_becomes_the_whole_one(bases: Path) -> None:
    for found in on_ranks(bare.as_whole, str(bases)):
        for name, (start, trained) in found.items():
            assert start == 0.0, name
            assert trained <= 1e-6, name


def test_an_adapter_without_values_is_told(bases: Path) -> None:
    for said in on_ranks(bare.unfilled, str(bases)):
        for way in ("to_empty", "by hand", "loaded"):
            assert "put on a model without values" in said[way]
            assert "lorica.parallel.materialize" in said[way]
        assert said["loaded again"] == ""
        assert "missing: model.layers.0.self_attn.q_proj.weight" in said["another base"]
        assert "from weights that have no values" in said["pissa"]
        assert said["no files"].startswith("FileError")
        assert "rank 0 gave no state" in said["no state"]
        assert "carries no adapter" in said["no adapter"]
        assert "table: buffers that no file holds" in said["buffers"]


def test_no_rank_holds_the_model_whole(tmp_path: Path) -> None:
    bare.write_base(tmp_path, hidden_size=256, intermediate_size=2048, num_hidden_layers=6)
    ways = {way: on_ranks(bare.growth, str(tmp_path), way) for way in ("bare", "built")}
    peaks = {way: max(peak for peak, _ in found) for way, found in ways.items()}
    assert peaks["bare"] <= 0.7 * peaks["built"], peaks
    losses = {loss for found in ways.values() for _, loss in found}
    assert max(losses) - min(losses) <= 1e-6
