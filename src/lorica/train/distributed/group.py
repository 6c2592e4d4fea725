"""The processes of one run: which this is, what the first does for all, what they agree on.

    with joined(...):                the process group, on GPUs or CPUs, if there are several processes
        by_first(work)               the first process works; all get its result, or its error
        any_of(flag)                 whether a flag is up on any of them

Without a launcher there is one process, and all of this does nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import distributed

from lorica.errors import LoricaError, StateError

T = TypeVar("T")

LAUNCHED = "LORICA_LAUNCHED"
"""Variable of the environment that says that lorica's own launcher tells how this machine's processes end."""

LOST = 75
"""Exit status of a process that lost another one and leaves it to that launcher to tell (EX_TEMPFAIL)."""


class OnAnother(LoricaError):
    """An error that another process of the run has, and tells."""


class Lost(LoricaError):
    """Another process of the run is gone, or a launcher has ended this one."""


class OfAll(LoricaError):
    """An end of the run in all of its processes alike."""


def world() -> int:
    """Number of the run's processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """This process's number, from 0; the launcher's number before the group is there."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def launched() -> int:
    """Number of processes by the environment."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdigit() or int(value) < 1:
        raise StateError(f"the environment's WORLD_SIZE must be a number of processes, not {value!r}")
    return int(value)


def on_cpu() -> bool:
    """Whether the processes of a run have no accelerator to compute on."""
    return not torch.accelerator.is_available()


def check_world(trained: int | None = None) -> None:
    """Refuse an environment and a process group that differ in the number of processes.

    Args:
        trained: processes among which a trainer splits the rows, where there is a trainer.

    Raises:
        StateError: naming both numbers.
    """
    if trained == 1 and launched() > 1:
        raise StateError(
            f"a launcher started {launched()} processes, and each of them would train on all rows: without a "
            "GPU, transformers forms a group of them only if TrainingArguments say use_cpu=True"
        )
    if not distributed.is_available() or not distributed.is_initialized() or "WORLD_SIZE" not in os.environ:
        return
    if (said := launched()) != (there := distributed.get_world_size()):
        raise StateError(
            f"the environment says that this run has {said} processes (WORLD_SIZE), and its process group "
            f"has {there}; let torchrun or `lorica train --launch.processes` start it, or make the group of "
            "WORLD_SIZE processes"
        )


def check_alone(what: str) -> None:
    """Refuse a feature that does not run in several processes.

    Raises:
        StateError: there are several.
    """
    if world() > 1:
        raise StateError(f"{what} runs in one process, and this run has {world()}; start it in one")


@contextlib.contextmanager
def joined(*, cpu: bool = False, hint: str = "start it again") -> Iterator[None]:
    """Join the other processes of a run, if a launcher started several; leave them at the end.

    A group that is there already is taken, and left there. Errors that all processes have are told by the
    first alone: in the others they become `OnAnother`.

    Args:
        cpu: compute on the CPU though there is an accelerator.
        hint: how to go on after a process was lost.

    Raises:
        StateError: the group that is there has another number of processes than the environment says.
        Lost: a process of the run is gone.
    """
    check_world()
    if launched() == 1 and world() == 1:
        yield
        return
    made = not distributed.is_initialized()
    if made:
        _join(cpu or on_cpu())
    # A group that was left would not be there any more to say who has told what.
    store = distributed.distributed_c10d._get_default_store()
    own, entry = rank(), next(_entries)
    global _together, _lost
    _together = _lost = False
    try:
        with _hearing_the_end(hint):
            yield
        _together = True
    except (RuntimeError, LoricaError) as error:
        _together = isinstance(error, LoricaError)
        told: Exception = error
        if not _together and is_of_network(error):
            told = Lost(f"another process of this run was lost ({_line(error)}); {hint}")
        apart = isinstance(told, LoricaError) and not isinstance(told, (OnAnother, OfAll))
        if apart and _others_tell(store, own, entry, told):
            _lost = isinstance(told, Lost)
            raise OnAnother(str(told)) from error
        raise told from (None if told is error else error)
    finally:
        while _ends:
            _ends.pop()()
        if made:
            distributed.destroy_process_group()


_entries = itertools.count()

_together = False
_lost = False


def left_together() -> bool:
    """Whether this process left its group at a place where the others leave it too."""
    return _together


def left_untold() -> bool:
    """Whether this process left its group because another was lost, and another tells it."""
    return _lost


_ends: list[Callable[[], None]] = []


def at_end(work: Callable[[], None]) -> None:
    """Have something done when this process leaves the others."""
    _ends.append(work)


def _join(cpu: bool) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise StateError(
            f"the environment says that this run has {launched()} processes (WORLD_SIZE) but has no "
            f"{' and no '.join(missing)}; let torchrun or `lorica train --launch.processes` start it, or "
            "unset WORLD_SIZE"
        )
    backend = "gloo"
    if not cpu and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"  # what is agreed on does not wait for the GPU
    distributed.init_process_group(backend, timeout=timedelta(minutes=30))


@contextlib.contextmanager
def _hearing_the_end(hint: str) -> Iterator[None]:
    """Launchers end the processes that are left with SIGTERM; they say how to go on before they end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise Lost(f"ended by SIGTERM, which a launcher sends when another process was lost; {hint}")

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_of_network(error: BaseException) -> bool:
    """Whether an error of torch's says that another process cannot be reached."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    text = str(error)
    return isinstance(error, kinds) or any(
        sign in text for sign in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )


def _line(error: BaseException) -> str:
    """The first sentence of an error."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
    return text.rpartition("]: ")[2]


def _others_tell(store: Any, own: int, entry: int, error: Exception) -> bool:
    """Whether another process tells an error: the one that is first to say so.

    Args:
        store: of the group.
        own: number of this process.
        entry: how often it had joined others before.
        error: the error.
    """
    try:
        if isinstance(error, Lost):
            here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
            return (LAUNCHED in os.environ and here) or store.add("lorica/lost", 1) > 1
        key = f"lorica/error/{entry}"
        if own == 0:
            store.set(key, str(error))
            return False
        store.wait([key], timedelta(seconds=3))
        return store.get(key).decode() == str(error)
    except Exception:  # the process that held the store is gone, or has no such error
        return False


def by_first(work: Callable[[], T]) -> T:
    """Have the first process do something, while the others wait for its result.

    Args:
        work: the function to call; its result is pickled.

    Returns:
        Its result, in each process.

    Raises:
        OnAnother: in the others, where the first has an error.
    """
    if world() == 1:
        return work()
    found: list[Any] = [None, None]
    failed: Exception | None = None
    if is_first():
        try:
            found[0] = work()
        except Exception as error:
            failed, found[1] = error, str(error) or type(error).__name__
    distributed.broadcast_object_list(found, src=0, group=_control())
    if failed is not None:
        raise failed
    if found[1] is not None:
        raise OnAnother(found[1])
    return found[0]


def gathered(value: T) -> list[T]:
    """A value of each process, in the order of their numbers."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    distributed.all_gather_object(found, value, group=_control())
    return found


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if world() > 1:
        any_of(False)


def any_of(flag: bool) -> bool:
    """Whether a flag is up on any process; all of them must ask."""
    if world() == 1:
        return flag
    up = torch.tensor(int(flag))
    distributed.all_reduce(up, op=distributed.ReduceOp.MAX, group=_control())
    return bool(up)


_controls: dict[Any, Any] = {}


def _control() -> Any:
    """A group whose tensors are on the CPU: the default one, or one beside it."""
    default = distributed.group.WORLD
    assert default is not None
    if "gloo" in str(distributed.get_backend_config(default)):
        return default
    if default not in _controls:
        _controls.clear()
        _controls[default] = distributed.new_group(backend="gloo")
    return _controls[default]
