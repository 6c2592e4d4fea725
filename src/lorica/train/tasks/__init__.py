"""The tasks lorica can train for, by name. `register` adds one of your own; nothing else needs to change."""

from __future__ import annotations

import inspect

from lorica.errors import ConfigError, nearest
from lorica.train.recipe import import_from, is_code, split_entry
from lorica.train.tasks.base import Encoded, Task
from lorica.train.tasks.causal_lm import CausalLanguageModelling
from lorica.train.tasks.image_classification import ImageClassification
from lorica.train.tasks.language import LanguageTask, SequenceToSequence
from lorica.train.tasks.post.grouped import GroupRelative, LeaveOneOut
from lorica.train.tasks.post.preference import Preference
from lorica.train.tasks.post.reward import Reward
from lorica.train.tasks.question_answering import QuestionAnswering
from lorica.train.tasks.texts import MultiLabelClassification, Regression, SequenceClassification
from lorica.train.tasks.token_classification import TokenClassification

__all__ = [
    "CausalLanguageModelling",
    "Encoded",
    "GroupRelative",
    "ImageClassification",
    "LanguageTask",
    "LeaveOneOut",
    "MultiLabelClassification",
    "Preference",
    "QuestionAnswering",
    "Regression",
    "Reward",
    "SequenceClassification",
    "SequenceToSequence",
    "Task",
    "TokenClassification",
    "get",
    "names",
    "register",
]

_TASKS: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task known by its name; usable as a decorator.

    Raises:
        ConfigError: another task has that name.
    """
    if _TASKS.setdefault(task.name, task) is not task:
        raise ConfigError(f"there is a task {task.name!r} already: {_TASKS[task.name].__qualname__}")
    return task


def get(name: str) -> Task:
    """The task of a name.

    Args:
        name: a name; or a class somewhere else, as ``path/to/file.py:Class`` or ``package.module:Class``.

    Raises:
        ConfigError: it does not exist.
        FileError: there is no such file or module, or it cannot be imported.
    """
    if is_code(name):
        return load_task(name)()
    if name not in _TASKS:
        raise ConfigError(
            f"there is no task {name!r}{nearest(name, _TASKS)}; the tasks are: {', '.join(_TASKS)}. One of "
            "your own is path/to/file.py:Class"
        )
    return _TASKS[name]()


def names() -> list[str]:
    """Names of all tasks."""
    return list(_TASKS)


for _task in (
    SequenceClassification,
    MultiLabelClassification,
    Regression,
    CausalLanguageModelling,
    SequenceToSequence,
    TokenClassification,
    QuestionAnswering,
    ImageClassification,
    Preference,
    Reward,
    GroupRelative,
    LeaveOneOut,
):
    register(_task)


_EARLIER = {
    f"lorica.train.tasks.{name}": f"lorica.train.tasks.{now}"
    for name, now in {
        **dict.fromkeys(("sequence_classification", "multi_label", "regression"), "texts"),
        "seq2seq": "language",
    }.items()
}
"""Modules that recipes written by earlier versions may name → where their tasks are now."""


def load_task(entry: str) -> type[Task]:
    """Find a task's class.

    Args:
        entry: ``path/to/file.py:Class`` or ``package.module:Class``. A file with one task in it needs no
            class.

    Raises:
        FileError: there is no such file or module, or it raised when imported.
        ConfigError: it has no such class, the class is no `Task`, or it leaves out something a task must say.
    """
    place, name = split_entry(entry)
    place = _EARLIER.get(place, place)
    module = import_from(place, "the task")
    found = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Task) and value.__module__ == module.__name__
    }
    if not name:
        if len(found) != 1:
            there = ", ".join(found) or "no class derived from lorica.train.Task"
            raise ConfigError(f"{place} holds {there}; name one: --task {place}:Class")
        name = next(iter(found))
    task = getattr(module, name, None)
    if task is None:
        raise ConfigError(f"{place} has no {name!r}{nearest(name, found)}")
    if not (inspect.isclass(task) and issubclass(task, Task)):
        raise ConfigError(f"in {place}, {name} is no lorica.train.Task")
    left = sorted(getattr(task, "__abstractmethods__", ()))
    left += [key for key in ("name", "task_type", "auto_class", "best_metric") if not hasattr(task, key)]
    if left:
        raise ConfigError(f"the task {entry} leaves out {', '.join(left)}; see lorica.train.Task")
    return task
