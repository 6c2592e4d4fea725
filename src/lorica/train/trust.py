"""Python code that a file names as its task: it runs only where the user says so.

A recipe travels: with an adapter from the Hub, in a colleague's folder. What it names as its task,
``file.py:Class``, is a program, and using the recipe would run it.
"""

from __future__ import annotations

from lorica.errors import ConfigError


def names_code(task: object) -> bool:
    """Whether a task is a class in somebody's file or module, and no name that lorica knows."""
    return isinstance(task, str) and (":" in task or task.endswith(".py"))


def check_trusted(task: object, where: str, *, trust_task: bool) -> None:
    """Refuse a task that is code, out of a file, unless the user trusts it.

    Args:
        task: as the file names it.
        where: what to call the file in the error.
        trust_task: the user's word.

    Raises:
        ConfigError: it is code, and not trusted.
    """
    if names_code(task) and not trust_task:
        raise ConfigError(
            f"{where} names Python code as its task, {task!r}, which would run here. Read it, and if you "
            "trust it, say so with --trust_task (in Python: trust_task=True)"
        )
