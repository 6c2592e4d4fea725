"""Rows that are encoded once on each machine, and mapped into memory by its other processes.

first process of a machine    reads, encodes, writes Arrow files, maps them
the others                    map the same files: no row is read, encoded or kept twice
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lorica.errors import LoricaError
from lorica.train import tasks
from lorica.train.console import quiet
from lorica.train.distributed.group import OnAnother, at_end, gathered, wait_for_all
from lorica.train.recipe import Recipe
from lorica.train.tasks import Task
from lorica.train.tasks.base import Encoded
from lorica.train.tasks.stored import store, stored

_FACTS = "facts.pickle"


class Encoding(NamedTuple):
    """Rows, and what was found on the way: the parts of `lorica.train.Prepared`, without the model."""

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Encoded]
    data: dict[str, dict[str, Any]]
    unlabelled: str | None = None
    notes: Sequence[str] = ()


def encoded_once(encode: Callable[[], Encoding]) -> Encoding:
    """The rows that one process of each machine encodes, in all of them.

    Args:
        encode: reads and encodes the rows.

    Raises:
        LoricaError: the rows cannot be used.
    """
    machine, leads = socket.gethostname(), os.environ.get("LOCAL_RANK", "0") == "0"
    found: Encoding | None = None
    folder: str | None = None
    failed: Exception | None = None
    if leads:
        try:
            found = encode()
            folder = _temporary()
            _write(found, Path(folder))
        except Exception as error:
            failed = error
    told = gathered((machine, folder, None if failed is None else str(failed) or type(failed).__name__))
    if failed is not None:
        raise failed
    if broken := next((reason for _, _, reason in told if reason is not None), None):
        raise OnAnother(broken)
    folder = folder or next((folder for where, folder, _ in told if where == machine and folder), None)
    if folder is None:
        raise LoricaError(f"no process of {machine} has the number 0 there (LOCAL_RANK), to encode the rows")
    result = _read(Path(folder), found)
    wait_for_all()
    return result


def _temporary() -> str:
    folder = tempfile.mkdtemp(prefix="lorica-rows-")
    at_end(lambda: shutil.rmtree(folder, ignore_errors=True))
    return folder


def _write(found: Encoding, folder: Path) -> None:
    with quiet():
        for name, encoded in found.splits.items():
            (folder / name).mkdir()
            store(encoded, folder / name)
    # The tokenizer and the task, which may be the user's code, each process makes for itself.
    names: Any = list(found.splits)
    facts = found._replace(splits=names, task=None, tokenizer=None)  # pyright: ignore[reportArgumentType]
    (folder / _FACTS).write_bytes(pickle.dumps(tuple(facts)))


def _read(folder: Path, found: Encoding | None) -> Encoding:
    """The rows that were written; `found` is this process's own copy, if it has one in memory."""
    facts = found or Encoding(*pickle.loads((folder / _FACTS).read_bytes()))
    splits = {name: stored(folder / name) for name in facts.splits}
    if found is not None:
        return found._replace(splits=splits)
    task = tasks.get(facts.recipe.task)
    return facts._replace(splits=splits, task=task, tokenizer=task.tokenizer(facts.recipe.model))
