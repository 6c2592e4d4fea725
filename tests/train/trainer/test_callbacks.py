from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from train import tiny
from transformers import TrainerCallback, TrainerState

import lorica
from lorica.train import Fit, Interrupted, Prepared, Recipe, fit, prepare, train
from lorica.train.trainer.callbacks import CheckpointCallback, interruptible, learned, unit


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


def skewed(folder: Path) -> Path:
    """Rows of which three in four are good, and test rows of which one in four is."""
    for split, good, bad in (("train", 30, 10), ("validation", 9, 3), ("test", 3, 9)):
        rows = [r for r in tiny.sentences(80) if r["label"] == "good"][:good]
        rows += [r for r in tiny.sentences(80) if r["label"] == "bad"][:bad]
        tiny.write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def lines(make_recipe: Callable[..., Recipe], tmp_path: Path) -> tuple[list[str], Path]:
    console = Console(file=io.StringIO(), width=300)
    recipe = make_recipe(learning_rate=1e-9, max_steps=2, eval_steps=1)
    recipe = recipe.replace(data={"train": str(skewed(tmp_path / "rows"))})
    output = train(recipe, console=console).output
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines(), output


def test_the_score_to_beat_stands_beside_each_result(lines: tuple[list[str], Path]) -> None:
    said, output = lines
    results = json.loads((output / "run.json").read_text())["results"]
    assert results["majority"]["validation"]["accuracy"] == 0.75
    assert results["majority"]["test"]["accuracy"] == 0.25
    assert results["majority"]["test"]["matthews"] == 0.0
    evaluated = [line for line in said if "validation: accuracy" in line]
    assert len(evaluated) == 2
    assert all("(largest class 0.7500)" in line for line in evaluated)


def test_one_class_for_all_rows_is_warned_of(lines: tuple[list[str], Path]) -> None:
    said, output = lines
    warnings = json.loads((output / "run.json").read_text())["results"]["warnings"]
    assert any("all 12 validation rows are called" in line for line in warnings)
    assert any("all 12 test rows are called" in line for line in warnings)
    assert sum(line.startswith("warning: all 12") for line in said) == 2


def doubts(history: list[dict[str, float]], *, fp16: bool = False) -> list[str]:
    trainer: Any = SimpleNamespace(args=SimpleNamespace(fp16=fp16), loss_falls=True)
    nothing: Any = None
    return list(Fit(nothing, trainer, 9, 1.0, None, history, nothing).doubts())


def test_a_loss_that_rose_or_was_no_number_is_warned_of() -> None:
    level: list[dict[str, float]] = [{"loss": 0.7, "grad_norm": 1.0}, {"eval_loss": 0.7}] * 5
    assert doubts(level) == []
    assert doubts([]) == []
    (said,) = doubts([*level, *[{"loss": 3.0, "grad_norm": 9.0}] * 3])
    assert said.startswith("the training loss rose from 0.7000 to 3.0000: training diverged")
    (said,) = doubts([*level, {"loss": 0.7, "grad_norm": math.nan}])
    assert "was not a number at times: training diverged; take a lower learning_rate" in said
    # A scaler of float16 tries its scale out.
    assert doubts([*level, {"loss": 0.7, "grad_norm": math.inf}], fp16=True) == []


@pytest.mark.parametrize(
    ("name", "counted", "amount"),
    [("input_ids", "tokens", 700), ("pixel_values", "samples", 60), ("input_features", "samples", 60)],
)
def test_what_is_counted(name: str, counted: str, amount: int) -> None:
    # 3 steps of 5 rows, 2 batches and 2 processes.
    args: Any = SimpleNamespace(train_batch_size=5, gradient_accumulation_steps=2, world_size=2)
    state = TrainerState(global_step=3, num_input_tokens_seen=700)
    model = SimpleNamespace(main_input_name=name)
    assert unit(model) == counted
    assert learned(model, args, state) == amount


def test_a_model_that_does_not_say_reads_tokens() -> None:
    assert unit(object()) == "tokens"
