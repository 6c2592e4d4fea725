"""The next commands to type, which run as they are printed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.reading import read_object

if TYPE_CHECKING:
    from lorica.train.recipe import Recipe

IN_PYTHON = "(rows given in Python)"

_TEXT = "A text to try it on."
_PAIR = r"A text.\tAnother one."  # `lorica predict` takes a written-out tab for one
_PROMPT = "A text to go on from"


def show(*commands: str | None) -> None:
    """Print a line for each command; None is none. On a line of its own, it can be copied whole."""
    for command in commands:
        if command is not None:
            print(f"next: {command}")


def command(*words: object) -> str:
    """A command with its words quoted where a shell would read them otherwise."""
    return shlex.join(["lorica", *map(str, words)])


def to_evaluate(folder: str | Path, recipe: Recipe, *, scored: bool) -> str | None:
    """The command that scores a folder, where its recipe has test rows."""
    if not scored or recipe.data.train == IN_PYTHON:
        return None
    return command("evaluate", folder, *word(recipe))


def to_use(folder: str | Path, recipe: Recipe) -> str | None:
    """The command that tries a folder on a text; None where its input is no text, or may be anything."""
    from lorica.train import tasks
    from lorica.train.recipe import is_code

    if is_code(recipe.task):
        return None
    task = tasks.get(recipe.task)
    if task.reads_files:
        return None
    if task.writes:
        return command("generate", folder, _PROMPT)
    return command("predict", folder, _PAIR if len(task.inputs(recipe.data)) == 2 else _TEXT)


def to_merge(base: str, folder: str | Path, recipe: Recipe) -> str | None:
    """The command that folds a method's update into its base, where it can be."""
    from lorica.config import family_of

    lora, others = recipe.configuration().members()
    if any(family_of(other) == "additive" for other in others) or (lora is None and not others):
        return None
    return command("merge", base, folder, "--output", unused(f"{folder}-merged"), *word(recipe))


def word(recipe: Recipe) -> list[str]:
    """The option that says that the user trusts the code that a recipe names."""
    return ["--trust_task"] if recipe.code() else []


def unused(name: str) -> Path:
    """A folder of that name, or with a number behind it, that is not there yet."""
    found, count = Path(name), 1
    while found.exists():
        count += 1
        found = Path(f"{name}-{count}")
    return found


def has_test_rows(folder: str | Path) -> bool:
    """Whether the run in a folder was scored on test rows."""
    try:
        rows: Any = read_object(Path(folder) / "run.json")["results"]["rows"]
        return "test" in rows
    except (OSError, ValueError, TypeError, LookupError):
        return False
