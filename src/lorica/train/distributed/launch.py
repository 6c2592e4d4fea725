"""Several processes for a command, on this machine or on several, by torch's elastic launcher.

The processes are forked from one that has imported what each of them needs, where the system can do that.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lorica.errors import ConfigError
from lorica.train.distributed.group import LAUNCHED, LOST, left_together, left_untold, on_cpu
from lorica.train.settings import LaunchConfig
from lorica.train.system import preloaded_context, settle

INTERRUPTED = 130


def launch(
    work: Callable[..., int],
    args: Sequence[Any],
    config: LaunchConfig,
    hint: str,
    *,
    seconds: float | None = None,
) -> int:
    """Call a function in several processes that find each other, and wait for all of them.

    Ctrl-C reaches each of them. Where one is lost, the others are ended, and a line says so; where this
    process is lost, all are.

    Args:
        work: a function at the top of a module, which returns an exit status.
        args: its arguments.
        config: how many processes.
        hint: how to go on after one was lost.
        seconds: after which they get what Ctrl-C would send them. None is never.

    Returns:
        0, or the status of the first process that failed.

    Raises:
        ConfigError: this machine has fewer GPUs.
    """
    assert config.processes is not None
    check_room(config.processes)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    alone = config.machines == 1
    context = preloaded_context()
    elastic = api.LaunchConfig(
        min_nodes=config.machines,
        max_nodes=config.machines,
        nproc_per_node=config.processes,
        run_id=uuid.uuid4().hex if alone else "lorica",
        rdzv_backend="c10d",
        rdzv_endpoint=config.address or "localhost:0",
        local_addr="localhost" if alone else None,
        max_restarts=0,
        start_method=context.get_start_method(),
        signals_to_handle="SIGTERM,SIGHUP",
    )
    asked = context.RawValue("b", 0)
    # A terminal's Ctrl-C comes to all of them, and is one; see `interruptible`.
    with _quiet(), _passing_on_interrupts(asked, seconds):
        try:
            codes = api.elastic_launch(elastic, _work)(work, tuple(args), config.processes, asked)
        except SignalException:
            print(f"ended by a signal; {hint}", file=sys.stderr)
            return 128 + signal.SIGTERM
        except ChildFailedError as error:
            for rank, failure in error.failures.items():
                if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
                    name = signal.Signals(-failure.exitcode).name
                    print(
                        f"process {rank} was lost (killed by {name}), and the others were ended; {hint}",
                        file=sys.stderr,
                    )
                    return 1
            code = abs(error.get_first_failure()[1].exitcode)
            if code != LOST:
                return code  # the process has told why
            # One that is left may be seen to end before the one that it lost.
            print(f"a process was lost, and the others were ended; {hint}", file=sys.stderr)
            return 1
    return next((code for code in codes.values() if code), 0)


def check_room(processes: int) -> None:
    """Refuse more processes than this machine has GPUs, if it has any.

    Raises:
        ConfigError: naming both numbers.
    """
    if on_cpu():
        return
    import torch

    if processes > (there := torch.accelerator.device_count()):
        raise ConfigError(f"launch.processes is {processes}, and this machine has {there} GPUs")


def _work(work: Callable[..., int], args: tuple[Any, ...], processes: int, asked: Any) -> int:
    """The work of each process, where the user has not pressed Ctrl-C before it began."""
    import torch

    early = True
    with contextlib.suppress(KeyboardInterrupt):  # the launcher would take it for a good end
        settle()
        early = bool(asked.value)
    if early:
        if os.environ["RANK"] == "0":
            print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED)
    os.environ[LAUNCHED] = "1"
    if on_cpu() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    code = work(*args)
    if code and not (code == INTERRUPTED and left_together()):
        sys.stdout.flush()
        raise SystemExit(LOST if left_untold() else code)  # the launcher ends the others
    return code


@contextlib.contextmanager
def _passing_on_interrupts(asked: Any, seconds: float | None) -> Iterator[None]:
    """Within it, Ctrl-C goes to the processes that were started; after it, handlers are as they were.

    Args:
        asked: set to 1 by Ctrl-C, for a process that is not there yet.
        seconds: after which they are sent one without it.
    """

    def on_signal(*_: object) -> None:
        asked.value = 1
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(child.pid, signal.SIGINT)  # type: ignore[arg-type]

    # The launcher leaves its own handlers behind for the other two.
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, on_signal)
    timer = None if seconds is None else threading.Timer(max(0.0, seconds), on_signal)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The launcher's own log says in twenty lines what we say in one."""
    loggers = [logging.getLogger(f"torch.distributed.{name}") for name in ("elastic", "launcher")]
    before = [logger.propagate for logger in loggers]
    silent = logging.NullHandler()
    for logger in loggers:
        logger.propagate = False
        logger.addHandler(silent)
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.removeHandler(silent)
