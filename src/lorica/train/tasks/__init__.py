"""The tasks lorica can train for, by name. `register` adds one of your own; nothing else needs to change."""

from __future__ import annotations

from lorica.errors import ConfigError, nearest
from lorica.train.tasks.base import Encoded, Task
from lorica.train.tasks.sequence_classification import SequenceClassification

__all__ = ["Encoded", "SequenceClassification", "Task", "get", "names", "register"]

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

    Raises:
        ConfigError: there is none.
    """
    if name not in _TASKS:
        raise ConfigError(
            f"there is no task {name!r}{nearest(name, _TASKS)}; the tasks are: {', '.join(_TASKS)}"
        )
    return _TASKS[name]()


def names() -> list[str]:
    """Names of all tasks."""
    return list(_TASKS)


register(SequenceClassification)
