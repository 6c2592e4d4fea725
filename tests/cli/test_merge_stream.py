"""``lorica merge --stream``: the same checkpoint as without, and going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import adapted, transformer

import lorica
from lorica.cli import main


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    model = transformer("llama")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    config = lorica.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    lorica.save(adapted(model, config), tmp_path / "adapter")
    return {name: str(tmp_path / name) for name in ("base", "adapter", "disk", "memory")}


def test_equal_to_the_command_without(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", places["base"], places["adapter"], "-o", places["memory"]]) == 0
    assert main(["merge", "--stream", places["base"], places["adapter"], "-o", places["disk"]]) == 0
    out = capsys.readouterr().out
    assert "share of each update lost to rounding" in out
    assert "more layers that lost less" in out
    one, other = (load_file(Path(places[where]) / "model.safetensors") for where in ("memory", "disk"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_another_dtype_and_a_warning_in_one_line(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    factors = load_file(Path(places["adapter"]) / "adapter_model.safetensors")
    small = {name: tensor * 0.02 for name, tensor in factors.items()}
    from safetensors.torch import save_file

    save_file(small, Path(places["adapter"]) / "adapter_model.safetensors", {"format": "pt"})
    start = ["merge", "--stream", places["base"], places["adapter"]]
    command = [*start, "-o", places["disk"], "--dtype", "bfloat16"]
    assert main(command) == 0
    assert "warning: stored as bfloat16, rounding takes about" in capsys.readouterr().err
    assert json.loads((Path(places["disk"]) / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_it_refuses(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    start = ["merge", "--stream"]
    assert main([*start, places["base"], places["adapter"], "-o", places["base"]]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main([*start, "no/such-base", places["adapter"], "-o", places["disk"]]) == 1
    assert "cannot find the base 'no/such-base'" in capsys.readouterr().err
    assert main([*start, places["base"], places["adapter"], "-o", places["disk"], "--dtype", "int8"]) == 1
    assert "dtype must be one of" in capsys.readouterr().err
    assert not Path(places["disk"]).exists()
