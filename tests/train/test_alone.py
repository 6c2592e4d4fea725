from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import StateError
from lorica.train import Recipe, train
from lorica.train.system import alone_in

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
