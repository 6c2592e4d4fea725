"""The tasks lorica can train for, by name. `register` adds one of your own; nothing else needs to change."""

from __future__ import annotations

from lorica.errors import ConfigError, nearest
from lorica.train.tasks.base import Encoded, Task
from lorica.train.tasks.causal_lm import CausalLanguageModelling
from lorica.train.tasks.files import load_task
from lorica.train.tasks.image_classification import ImageClassification
from lorica.train.tasks.language import LanguageTask
from lorica.train.tasks.multi_label import MultiLabelClassification
from lorica.train.tasks.question_answering import QuestionAnswering
from lorica.train.tasks.regression import Regression
from lorica.train.tasks.seq2seq import SequenceToSequence
from lorica.train.tasks.sequence_classification import SequenceClassification
from lorica.train.tasks.token_classification import TokenClassification

__all__ = [
    "CausalLanguageModelling",
    "Encoded",
    "ImageClassification",
    "LanguageTask",
    "MultiLabelClassification",
    "QuestionAnswering",
    "Regression",
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
        ConfigError: there is none.
        FileError: there is no such file or module, or it cannot be imported.
    """
    if ":" in name or name.endswith(".py"):
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
):
    register(_task)
