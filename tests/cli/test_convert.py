from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorica
from lorica.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of loralib's: c_attn has q and v, out one update, and there is a head."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "h.0.c_attn.lora_A": (4, 6),
        "h.0.c_attn.lora_B": (12, 2),
        "h.0.out.lora_A": (2, 6),
        "h.0.out.lora_B": (6, 2),
        "head.weight": (3, 6),
    }
    path = tmp_path / "lora.pt"
    torch.save({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, path)
    return path


def same(one: Path, other: Path) -> bool:
    a, b = torch.load(one), torch.load(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("how", [["--enable_lora", "c_attn=true,False,1"], ["--split", "c_attn=q, -,v"]])
def test_there_and_back(
    how: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, back = tmp_path / "peft", tmp_path / "back.pt"
    more = ["--alpha", "4", "--base_model", "gpt2", "--task_type", "CAUSAL_LM"]
    assert main(["convert", str(source), "-o", str(folder), *more, *how]) == 0
    out = capsys.readouterr().out
    assert f"and 1 tensor trained whole to {folder}" in out
    assert "trained whole: head" in out
    config = lorica.read(folder).lora
    assert (config.base_model_name_or_path, config.task_type) == ("gpt2", "CAUSAL_LM")
    assert config.target_modules == (["c_attn", "out"] if "--enable_lora" in how else ["out", "q", "v"])
    assert main(["convert", str(folder), "-o", str(back), *how]) == 0
    out = capsys.readouterr().out
    assert "the file does not hold the scale; make the layers with r=2, lora_alpha=4" in out
    assert same(source, back)


def test_names_of_classes_are_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = {"q": lorica.Factors(torch.ones(2, 6), torch.ones(4, 2), 1.0)}
    adapter = lorica.Adapter(lorica.LoraConfig(r=2, target_modules=["q"]), factors, classes=("bad", "good"))
    lorica.write(adapter, tmp_path / "peft")
    assert main(["convert", str(tmp_path / "peft"), "-o", str(tmp_path / "lora.pt")]) == 0
    assert "the file does not hold the names of the classes: bad, good" in capsys.readouterr().out
    assert [*torch.load(tmp_path / "lora.pt")] == ["q.lora_A", "q.lora_B"]


def test_names_may_be_given(source: Path, tmp_path: Path) -> None:
    argv = ["convert", str(source), "-o", str(tmp_path / "peft")]
    argv += ["--alpha=4", "--split=c_attn=q,-,v", "--to=peft"]
    more = [
        "--target_modules=h.0.q",
        "--target_modules=h.0.v",
        "--target_modules=out",
        "--modules_to_save=head",
    ]
    assert main([*argv, *more]) == 0
    assert lorica.read(tmp_path / "peft").lora.target_modules == ["h.0.q", "h.0.v", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "does not hold lora_alpha"),
        (["--alpha", "4"], "h.0.c_attn: holds 2 updates of rank 2 in one"),
        (["--to", "loralib"], "is loralib's already"),
        (["--to", "peff"], "--to must be peft or loralib, not 'peff'"),
        (["--enable_lora", "c_attn"], "--enable_lora takes NAME=a,b,c"),
        (["--enable_lora", "c_attn=q,k,v"], "takes true or false for each projection, not 'q'"),
        (["--alpha", "4", "--split", "c_attn=q,-,v", "--embedding", "wte"], "wte: named as embeddings"),
    ],
)
def test_what_is_wrong(
    options: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), "-o", str(tmp_path / "peft"), *options]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lora.pt"]


def test_no_such_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 1
    assert "neither a file nor a folder" in capsys.readouterr().err
