"""A task of the user's own, from a file or a module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from lorica.errors import ConfigError, FileError, nearest
from lorica.train.tasks.base import Task


def load_task(entry: str) -> type[Task]:
    """Find a task's class.

    Args:
        entry: ``path/to/file.py:Class`` or ``package.module:Class``. A file with one task in it needs no
            class.

    Raises:
        FileError: there is no such file or module, or it raised when imported.
        ConfigError: it has no such class, the class is no `Task`, or it leaves out something a task must say.
    """
    place, _, name = (
        entry.rpartition(":") if ".py:" in entry or not entry.endswith(".py") else (entry, "", "")
    )
    module = _import(place)
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


def _import(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise FileError(f"there is no file {place} to take the task from")
        name = f"_lorica_task_{path.stem}_{abs(hash(path)):x}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"cannot import the task from {place}: {type(error).__name__}: {error}") from error
