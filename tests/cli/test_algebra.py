"""``lorica combine`` and ``lorica compress``: what they write, and the error they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from algebra.made import agree, made, weighted

import lorica
from lorica import algebra
from lorica.cli import main


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Three adapters on disk, the last with a head; and places that are not there yet."""
    lorica.write(made(4, 6), tmp_path / "one")
    lorica.write(made(4, 3, seed=1, use_rslora=True, base_model_name_or_path="org/base"), tmp_path / "two")
    head = made(2, seed=2, extras={"head.weight": torch.ones(2)}, base_model_name_or_path="org/other")
    lorica.write(head, tmp_path / "three")
    return {name: str(tmp_path / name) for name in ("one", "two", "three", "out", "again")}


def adapters(folders: dict[str, str], *names: str) -> list[lorica.Adapter]:
    return [lorica.read(folders[name]) for name in names]


def test_sum(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["combine", folders["one"], folders["two"], "-o", folders["out"], "--weights", "0.7", "-1.3"]
    assert main(argv) == 0
    agree(lorica.read(folders["out"]), weighted(adapters(folders, "one", "two"), [0.7, -1.3]))
    out = capsys.readouterr().out
    assert "relative error of the update, to the weighted sum" in out
    assert float(re.search(r"worst (\S+) \(", out)[1]) < 1e-6  # type: ignore[index]
    assert f"wrote an adapter of rank 8, 2.3 kB, to {folders['out']}" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "cat"], {}),
        (["--method", "linear"], {}),
        (["--method", "svd", "--rank", "2", "--clamp", "0.9"], {"svd_rank": 2, "svd_clamp": 0.9}),
        (
            ["--method", "ties", "--density", "0.5", "--majority_sign_method", "frequency"],
            {"density": 0.5, "majority_sign_method": "frequency"},
        ),
        (["--method", "magnitude-prune-svd", "--density", "0.5"], {"density": 0.5}),
        (["--method=dare-ties", "--density=0.5", "--seed=3"], {"density": 0.5, "seed": 3}),
    ],
)
def test_every_option_arrives(options: list[str], told: dict[str, object], folders: dict[str, str]) -> None:
    assert main(["combine", folders["one"], folders["two"], "-o", folders["out"], *options]) == 0
    method = options[1] if options[0] == "--method" else options[0].partition("=")[2]
    terms = adapters(folders, "one", "two")
    expected = algebra.combine(terms, method=method.replace("-", "_"), **told)  # type: ignore[arg-type]
    found = lorica.read(folders["out"])
    assert all(torch.equal(t, expected.named_tensors()[name]) for name, t in found.named_tensors().items())


def test_other_bases_and_heads(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    changed = made(2, seed=5, extras={"head.weight": torch.zeros(2)})
    lorica.write(changed, folders["again"])
    argv = ["combine", folders["three"], folders["again"], folders["two"], "-o", folders["out"]]
    assert main(argv) == 1
    assert "head.weight: other values in each" in capsys.readouterr().err
    assert not Path(folders["out"]).exists()
    assert main([*argv, "--keep", folders["again"]]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("warning: the adapters name different bases: 'org/other', 'org/base'")
    assert lorica.read(folders["out"]).extras["head.weight"].tolist() == [0, 0]
    assert main(["combine", *argv[1:4], "-o", f"{folders['out']}2", "--keep", "elsewhere"]) == 1
    assert "--keep must be one of" in capsys.readouterr().err


def test_compress(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", folders["one"], "-o", folders["out"], "--rank", "2"]) == 0
    out = capsys.readouterr().out
    _, report = algebra.compress(lorica.read(folders["one"]), rank=2)
    assert f"to {folders['one']}" in out
    path, worst = report.worst
    assert f"worst {worst:.2e} ({path}), mean {report.mean:.2e}; kept energy {report.energy:.2%}" in out
    assert {f.r for f in lorica.read(folders["out"]).factors.values()} == {2}
    assert main(["compress", folders["one"], "-o", folders["again"], "--energy", "0.9"]) == 0
    assert "wrote an adapter of rank 2 to 4, " in capsys.readouterr().out


def test_a_long_table_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    f = made().factors["a.linear"]
    many = lorica.Adapter(lorica.LoraConfig(r=4, lora_alpha=6), {f"layer.{i}": f for i in range(13)})
    lorica.write(many, tmp_path / "many")
    assert main(["compress", str(tmp_path / "many"), "-o", str(tmp_path / "out"), "--rank", "1"]) == 0
    assert "... and 3 more layers with less" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compress", "one", "-o", "out"], "give rank or energy"),
        (["compress", "one", "-o", "out", "--energy", "2"], "energy must be a share in (0, 1], not 2"),
        (["compress", "one", "-o", "two", "--rank", "1"], "two is not empty; give a new folder"),
        (["compress", "out", "-o", "again", "--rank", "1"], "out is not an adapter"),
        (["combine", "one", "two", "-o", "out", "--method", "tie"], "no method 'tie'; did you mean 'ties'"),
        (["combine", "one", "two", "-o", "out", "--density", "0.5"], "cat takes no density"),
        (["combine", "one", "two", "-o", "out", "--weights", "1"], "expected 2 finite weights"),
        (["combine", "one", "three", "-o", "out", "--method", "linear"], "one rank in each layer"),
        (["combine", "one", "-o", "two"], "two is not empty"),
    ],
)
def test_what_it_refuses(
    argv: list[str], message: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([folders.get(word, word) for word in argv]) == 1
    assert message in capsys.readouterr().err
    assert not Path(folders["out"]).exists()
