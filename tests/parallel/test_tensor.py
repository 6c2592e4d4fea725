"""Split over ranks by tensor parallel, alone and with sharding: what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from parallel import across
from ranks import on_ranks

pytest.importorskip("transformers")


def test_split_in_two(tmp_path: Path) -> None:
    for found in on_ranks(across.split_in_two, str(tmp_path)):
        assert found.keys() == across.CASES.keys()
        for name, differences in found.items():
            for what, difference in differences.items():
                assert difference <= 1e-5, (name, what)


def test_split_in_two_and_sharded_in_two(tmp_path: Path) -> None:
    for found in on_ranks(across.four, str(tmp_path), world=4):
        for name, differences in found.items():
            for what, difference in differences.items():
                assert difference <= 1e-5, (name, what)


def test_what_cannot_be_split_is_refused() -> None:
    for said in on_ranks(across.refused):
        assert "set lora_dropout=0" in said["dropout"]
        assert "plain adapted linear layers alone" in said["a head"]
        assert "'diagonal'" in said["unknown style"]
        assert "did you mean 'lm_head'" in said["unknown module"]
        assert "has no plan of its own" in said["no plan"]
        assert "which lorica does not know" in said["experts"]
        assert "split or sharded already" in said["twice"]
        assert "cannot merge" in said["merge"]
        assert "tensor parallel" in said["adapt"]


def test_the_styles_are_torchs_own() -> None:
    assert on_ranks(across.by_torch) == pytest.approx([0.0, 0.0], abs=1e-6)
