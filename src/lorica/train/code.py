"""Python of the user's own, which a recipe names: ``path/to/file.py:Name`` or ``package.module:Name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from lorica.errors import FileError


def is_code(entry: object) -> bool:
    """Whether an entry of a recipe names something in somebody's file or module."""
    return isinstance(entry, str) and (":" in entry or entry.endswith(".py"))


def split_entry(entry: str) -> tuple[str, str]:
    """The file or module of an entry, and the name in it; the name may be left out behind a file."""
    if ".py:" in entry or not entry.endswith(".py"):
        place, _, name = entry.rpartition(":")
        return place, name
    return entry, ""


def import_from(place: str, what: str) -> ModuleType:
    """Import a file or a module, which runs it.

    Args:
        place: ``path/to/file.py`` or ``package.module``.
        what: name of the object that is taken from it, such as "the task", for errors.

    Raises:
        FileError: there is no such file or module, or it raised when imported.
    """
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise FileError(f"there is no file {place} to take {what} from")
        name = f"_lorica_{path.stem}_{abs(hash(path)):x}"
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
        raise FileError(f"cannot import {what} from {place}: {type(error).__name__}: {error}") from error
