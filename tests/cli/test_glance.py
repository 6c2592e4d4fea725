"""`lorica info` says the same of an adapter with torch and without."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.cli.adapters.glance import glance
from lorica.cli.adapters.info import describe, whole_read


def made(dtype: torch.dtype = torch.float32, **settings: Any) -> lorica.Adapter:
    """Two layers of other ranks, and a head."""
    draw = torch.Generator().manual_seed(0)
    config = lorica.LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"v": 2},
        target_modules=["q", "v"],
        modules_to_save=["head"],
        **settings,
    )
    factors = {
        f"h.{i}.{name}": lorica.Factors(
            torch.randn(r, 5, generator=draw).to(dtype), torch.randn(7, r, generator=draw).to(dtype), scale
        )
        for i in range(2)
        for name, r in (("q", 4), ("v", 2))
        for scale in [config.scale(f"h.{i}.{name}")]
    }
    return lorica.Adapter(config, factors, {"head.weight": torch.randn(3, 5, generator=draw)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_same_as_a_whole_read(dtype: torch.dtype, use_rslora: bool, tmp_path: Path) -> None:
    adapter = made(dtype, use_rslora=use_rslora, base_model_name_or_path="org/base")
    lorica.write(adapter, tmp_path)
    found = glance(tmp_path)
    assert found is not None
    config, light = found
    read, whole = whole_read(str(tmp_path))
    assert config == read
    for path, f in adapter.factors.items():
        dense = f.scale * f.B.double() @ f.A.double()
        assert light["layers"][path].pop("norm") == pytest.approx(float(torch.linalg.norm(dense)), rel=1e-9)
        assert whole["layers"][path].pop("norm") > 0
    assert {**light, "added": {}} == whole


def test_without_torch(tmp_path: Path) -> None:
    lorica.write(dataclasses.replace(made(), classes=("bad", "good")), tmp_path)  # as `lorica train` does
    run = f"main(['info', {str(tmp_path)!r}])"
    code = f"import sys; from lorica.cli import main; {run}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "h.1.q" in done.stdout


def test_what_takes_a_whole_read(tmp_path: Path) -> None:
    """What means more than its header says, and what is damaged: which the whole read then tells."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv1d(4, 4, 3), torch.nn.Embedding(5, 4))
    cases: list[dict[str, Any]] = [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}]
    for i, more in enumerate(cases):
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["0"], **more))
        lorica.save(model, tmp_path / str(i))
        lorica.detach(model)
        assert glance(tmp_path / str(i)) is None
        assert describe(str(tmp_path / str(i)))["layers"]
    for name in ("1", "2"):
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=[name]))
        lorica.save(model, tmp_path / f"other-{name}")
        lorica.detach(model)
        assert glance(tmp_path / f"other-{name}") is None
    bad = tmp_path / "bad"
    lorica.write(made(), bad)
    weights = (bad / "adapter_model.safetensors").read_bytes()
    for damaged in (weights[:-8], weights[:40], b"", b"\xff" * 64):
        (bad / "adapter_model.safetensors").write_bytes(damaged)
        assert glance(bad) is None
        with pytest.raises(lorica.LoricaError):
            describe(str(bad))
    lorica.write(dataclasses.replace(made(), classes=("a", "b")), bad)
    named = (bad / "adapter_model.safetensors").read_bytes()
    assert glance(bad) is not None
    (bad / "adapter_model.safetensors").write_bytes(named.replace(rb"[\"a\", \"b\"]", rb"[\"a\", 123]  "))
    assert glance(bad) is None
    with pytest.raises(lorica.LoricaError, match="no list of names"):
        describe(str(bad))
    hole = bytearray(weights)
    hole[-4:] = b"\x00\x00\xc0\x7f"  # the last number is none
    (bad / "adapter_model.safetensors").write_bytes(bytes(hole))
    assert glance(bad) is None
    assert glance(tmp_path / "nowhere") is None
