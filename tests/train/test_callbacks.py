from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

import lorica
from lorica.train import Fit, Interrupted, Prepared, Recipe, fit, prepare
from lorica.train.trainer.callbacks import CheckpointCallback, interruptible


@pytest.fixture(autouse=True)
def answers_to_ctrl_c() -> Iterator[None]:
    """Python's own answer to Ctrl-C; a job in the background of a shell starts with none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(recipe: Recipe, console: Console | None = None, **options: Any) -> Fit:
    prepared: Prepared = prepare(recipe)
    model = lorica.adapt(prepared.model, recipe.method.replace(task_type="SEQ_CLS"), seed=0)
    splits = prepared.splits
    return fit(
        model,
        prepared.task,
        prepared.tokenizer,
        splits["train"].features,
        splits["validation"].features,
        recipe.training,
        recipe.output,
        console=console or Console(file=io.StringIO(), width=200),
        **options,
    )


class PressCtrlC(TrainerCallback):
    def __init__(self, step: int, times: int = 1) -> None:
        self.step = step
        self.times = times

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for _press in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [0, 4, 9, 10])
def test_ctrl_c_saves_and_a_resume_ends_alike(
    make_recipe: Callable[..., Recipe], tmp_path: Path, step: int
) -> None:
    whole = make_recipe(load_best=False).replace(output=str(tmp_path / "whole"))
    lorica.save(start(whole).model, tmp_path / "a")
    recipe = make_recipe(load_best=False)
    output = io.StringIO()
    with pytest.raises(Interrupted, match="interrupted; saved") as stop:
        start(recipe, Console(file=output), callbacks=[PressCtrlC(step)])
    assert "Ctrl-C again stops at once" in output.getvalue()
    assert stop.value.checkpoint == (Path(recipe.output) / "checkpoints" / f"checkpoint-{step + 1}").resolve()
    lorica.save(start(recipe, resume=True).model, tmp_path / "b")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(one[name].equal(other[name]) for name in one)


def test_a_second_ctrl_c_stops_at_once(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(make_recipe(), callbacks=[PressCtrlC(3, times=2)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_very_end_lets_the_run_finish(make_recipe: Callable[..., Recipe]) -> None:
    assert start(make_recipe(), callbacks=[PressCtrlC(19)]).steps == 20


def test_signals_are_left_to_the_main_thread() -> None:
    def elsewhere() -> None:
        with interruptible(CheckpointCallback(), Console()):
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[Any] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_lines_into_a_pipe(make_recipe: Callable[..., Recipe]) -> None:
    output = io.StringIO()
    done = start(make_recipe(), Console(file=output, width=200), title="tiny")
    lines = output.getvalue().splitlines()
    assert any(line.startswith("tiny  step 20/20  loss ") and "tokens/s  ETA 0:00" in line for line in lines)
    assert sum("validation: accuracy" in line for line in lines) == 2
    assert "\x1b" not in output.getvalue()
    assert done.step_seconds is not None


def test_a_moving_line_on_a_terminal(make_recipe: Callable[..., Recipe]) -> None:
    output = io.StringIO()
    start(make_recipe(), Console(file=output, width=200, force_terminal=True))
    assert "tokens/s" in output.getvalue()
    assert "\x1b[?25h" in output.getvalue(), "the cursor is shown again"


def test_steps_between_checkpoints(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(save_steps=4, save_total_limit=20)
    start(recipe)
    steps = sorted(int(path.name.split("-")[1]) for path in (Path(recipe.output) / "checkpoints").iterdir())
    assert steps == [4, 8, 10, 12, 16, 20]
