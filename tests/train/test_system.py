from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.errors import FileError, StateError
from lorica.train import Recipe, train
from lorica.train import system as files
from lorica.train.system import alone_in


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    files.write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "old")]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write to .*file/run: .*; choose another folder"):
        files.writable_directory(tmp_path / "file" / "run")
    assert files.writable_directory(tmp_path / "a" / "b").is_dir()


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("xyz")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("xy")
    assert files.bytes_of(tmp_path / "a") == 3
    assert files.bytes_of(tmp_path) == 5


HOLD = """
import sys, time
from lorica.train.system import alone_in
with alone_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_in_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with alone_in(tmp_path / "out") as folder:
        with (
            pytest.raises(StateError, match=r"another search is at work in .*out; wait"),
            alone_in(folder, "search"),
        ):
            pass
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "out"):
        pass


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    with alone_in(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []
    with alone_in(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StateError), alone_in(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_training_into_a_folder_in_use_is_refused_and_changes_nothing(
    options: dict[str, Any], make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(max_steps=1)
    with alone_in(recipe.output) as folder:
        with pytest.raises(StateError, match="another run is at work in"):
            train(recipe, **options)
        assert list(folder.iterdir()) == []


PARENT = """
import subprocess, sys
ballast = bytearray(600_000_000)
print(subprocess.check_output([sys.executable, "-c", sys.argv[1]], text=True))
"""

CHILD = "from lorica.train.system import peak_memory; print(peak_memory())"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is its own")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_process_is_not_charged_for_what_its_parent_had() -> None:
    alone, child = (
        int(subprocess.check_output([sys.executable, "-c", *argv], text=True))
        for argv in ([CHILD], [PARENT, CHILD])
    )
    assert child < alone + 200_000_000
