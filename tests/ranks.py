"""A function in several processes at once, as torchrun would start it: forked from one that has torch loaded.

    def gradient(rank_rows): ...                  # at the top of a module; it may use torch.distributed
    first, second = on_ranks(gradient, rows)      # what each rank returned, in the order of ranks

The processes come from multiprocessing's fork server, which imports torch and transformers once. Their gloo
group meets at a store that the test holds, so no two tests contend for a port.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from waiting import PATIENCE

from lorica.train.system import preloaded_context, settle


class Ended(NamedTuple):
    """How a rank ended.

    Args:
        code: its exit status; minus the signal's number where one killed it.
        value: what its function returned; None where it did not.
        output: what it printed to both streams.
    """

    code: int
    value: Any
    output: str


class Ranks:
    """Processes at work, one a rank; see `started`."""

    def __init__(
        self, action: Callable[..., Any], args: Sequence[Any], world: int | None, *, group: bool
    ) -> None:
        """Start them."""
        self._folder = tempfile.TemporaryDirectory()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context: Any = preloaded_context()
        work = pickle.dumps((action, args))

        def environment(rank: int) -> dict[str, str]:
            if world is None:
                return {}
            return {
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }

        self.processes: list[BaseProcess] = [
            context.Process(target=_work, args=(work, environment(rank), self.folder(rank), group))
            for rank in range(world or 1)
        ]
        with mock.patch.dict(sys.modules, __main__=ModuleType("__main__")):  # else each would run pytest's
            for process in self.processes:
                process.start()

    def folder(self, rank: int) -> str:
        """Where a rank leaves what it printed and returned."""
        folder = Path(self._folder.name) / str(rank)
        folder.mkdir(exist_ok=True)
        return str(folder)

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        path = Path(self.folder(rank)) / "output"
        return path.read_text(errors="replace") if path.is_file() else ""

    def send(self, rank: int, number: int) -> None:
        """Send a rank a signal."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, timeout: float = PATIENCE) -> list[Ended]:
        """Wait for all ranks.

        Args:
            timeout: seconds after which those that are left are killed.

        Raises:
            AssertionError: one was left; with what all had printed, and where they were.
        """
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        left = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in left:
            self.send(rank, 6)  # faulthandler prints where it was
            self.processes[rank].join()
        outputs = [self.output(rank) for rank in range(len(self.processes))]
        ended = [
            Ended(process.exitcode or 0, _value(Path(self.folder(rank)) / "value"), outputs[rank])
            for rank, process in enumerate(self.processes)
        ]
        self._folder.cleanup()
        assert not left, f"ranks {left} did not end in {timeout:g} s\n{_told(outputs)}"
        return ended


def started(action: Callable[..., Any], *args: Any, world: int | None = 2, group: bool = False) -> Ranks:
    """Start a function in several processes, and return while they are at work.

    Args:
        action: a function at the top of a module; what it returns must pickle.
        args: its arguments, the same for each rank.
        world: how many processes; None is one that knows of no others.
        group: make their process group before, of gloo; else the environment alone says that there is one.
    """
    return Ranks(action, args, world, group=group)


def on_ranks(action: Callable[..., Any], *args: Any, world: int = 2, timeout: float = PATIENCE) -> list[Any]:
    """Call a function in several processes that form a group, and return what each of them returned.

    Args:
        action: a function at the top of a module; it may use `torch.distributed`.
        args: its arguments, the same for each rank.
        world: how many processes.
        timeout: seconds after which they are killed.

    Raises:
        AssertionError: a rank failed; with what all of them printed.
    """
    ended = started(action, *args, world=world, group=True).wait(timeout)
    failed = {rank: each.code for rank, each in enumerate(ended) if each.code}
    assert not failed, f"exit status by rank: {failed}\n{_told([each.output for each in ended])}"
    return [each.value for each in ended]


def _work(work: bytes, environment: dict[str, str], folder: str, group: bool) -> None:
    with (Path(folder) / "output").open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    faulthandler.enable()
    settle()
    os.fsync = lambda fd: None  # as in conftest.py
    os.environ.update(environment)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # test modules are tests.… to pytest
    torch.set_num_threads(1)
    torch.manual_seed(0)
    code = 0
    try:
        if group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
        action, args = pickle.loads(work)
        torch.save(action(*args), Path(folder) / "value")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    os._exit(code)  # what a test forked is not what it should clean up


def _value(path: Path) -> Any:
    return torch.load(path, weights_only=False) if path.is_file() else None


def _told(outputs: Sequence[str]) -> str:
    return "\n".join(f"--- rank {rank}\n{output}" for rank, output in enumerate(outputs))
