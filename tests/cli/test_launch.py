"""`--launch.processes`: a command in several processes, which are stopped, lost and started again."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from launched import launching, losing, pooling
from safetensors.torch import load_file
from torch.distributed.launcher import api as launcher
from train import tiny

from lorica.cli import main
from lorica.errors import ConfigError
from lorica.train import Record, system, train
from lorica.train.distributed.launch import launch
from lorica.train.settings import LaunchConfig


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("launched")
    tiny.write_model(home / "model")
    tiny.write_data(home / "data")
    return home


def command(home: Path, name: str, steps: int, *more: str) -> list[str]:
    made = tiny.recipe(home / "model", home / "data", home / name, save_steps=5, max_steps=steps)
    made.replace(training={"load_best": False, "eval_steps": steps}).save(home / f"{name}.yaml")
    return ["train", str(home / f"{name}.yaml"), "--launch.processes", "2", *more]


def after_the_next_checkpoint(folder: Path, action: Callable[[], None]) -> threading.Thread:
    def checkpoints() -> set[Path]:
        return set(folder.glob("checkpoints/checkpoint-*/trainer_state.json"))

    before = checkpoints()

    def wait() -> None:
        while checkpoints() <= before:
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_run_is_trained_and_scored_in_two_processes(home: Path) -> None:
    assert main(command(home, "run", 6, "--launch.engine", "fsdp2")) == 0
    assert Record.load(home / "run").machine["processes"] == 2
    assert main(["evaluate", str(home / "run"), "--json", "--launch.processes=2"]) == 0
    answers = home / "answers.jsonl"
    texts = home / "data" / "test.jsonl"
    assert main(["predict", str(home / "run"), str(texts), "-o", str(answers), "--launch.processes=2"]) == 0
    assert len([json.loads(line) for line in answers.read_text().splitlines()]) == 12


def test_a_lost_process_and_an_interrupt_end_the_others(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "stopped"

    def kill() -> None:
        pid = multiprocessing.active_children()[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    watching = after_the_next_checkpoint(run, kill)
    assert main(command(home, run.name, 4000)) == 1
    watching.join()
    err = capsys.readouterr().err
    assert re.search(r"process( \d)? was lost( \(killed by SIGKILL\))?, and the others were ended", err)
    assert "--resume" in err
    watching = after_the_next_checkpoint(run, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(command(home, run.name, 4000, "--resume")) == 130
    watching.join()
    assert not (run / "adapter_model.safetensors").exists()
    assert load_file(
        max(run.glob("checkpoints/checkpoint-*"), key=os.path.getmtime) / "adapter_model.safetensors"
    )


def test_a_loss_is_told_where_the_one_that_is_left_ends_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(losing, (), LaunchConfig(processes=2), "start it again") == 1
    assert capsys.readouterr().err == "a process was lost, and the others were ended; start it again\n"


def runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("start", [launching, pooling])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, start: Callable[[Path], None]) -> None:
    context: Any = system.preloaded_context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # else it would run pytest's
        launcher = context.Process(target=start, args=(tmp_path,))
        launcher.start()
    while len(there := list(tmp_path.glob("*.pid"))) < 2:
        assert launcher.is_alive()
        time.sleep(0.05)
    launcher.kill()
    launcher.join()
    went_on = tmp_path / "went on"
    while any(runs(int(path.stem)) for path in there) and not went_on.exists():
        time.sleep(0.05)
    assert not went_on.exists()


def test_an_interrupt_before_there_are_processes_is_kept_for_them(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = launcher.elastic_launch

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(launcher, "elastic_launch", interrupted)
    assert main(command(home, "early", 4000)) == 130
    assert not list((home / "early").glob("checkpoints/*"))


def test_wrong_use(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        LaunchConfig(processes=2, machines=2)
    with pytest.raises(ConfigError, match=r"need launch.processes"):
        LaunchConfig(address="first:29500")
    with pytest.raises(ConfigError, match=r"launch.engine must be one of \('ddp', 'fsdp2'"):
        LaunchConfig(engine="zero")
    with pytest.raises(ConfigError, match="spreads a model over several processes, and this run has one"):
        train(tiny.recipe(home / "model", home / "data", home / "alone"), engine="fsdp2")
    assert main(["evaluate", str(home), "--launch.engine", "fsdp2", "--launch.processes", "2"]) == 2
    assert "holds the whole model in each of its own processes" in capsys.readouterr().err
    assert main(["train", "--changed_processes"]) == 2
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--launch.processes", "2"]) == 2
    assert "torchrun has started this already" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["tune", "--help"]) == 1
    assert "lorica tune runs in one process" in capsys.readouterr().err
