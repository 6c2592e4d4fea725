"""Every error lorica raises on purpose.

All derive from `LoricaError`, and also from the built-in a caller would reach for (`ValueError`, `TypeError`,
`RuntimeError`, `ImportError`), so that neither ``except LoricaError`` nor ``except ValueError`` misses one. A
message names the thing, says what was expected and what came, and suggests the fix.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class LoricaError(Exception):
    """Base of every error that lorica raises on purpose."""


class ConfigError(LoricaError, ValueError):
    """A configuration holds a value that cannot be used."""


class ConfigTypeError(ConfigError, TypeError):
    """A configuration, or an argument, is of a type that cannot be used."""


class UnknownField(ConfigTypeError):
    """A configuration has a field that nobody knows."""


class TargetError(LoricaError, ValueError):
    """A pattern names a module that the model does not have, or that cannot be adapted."""


class TargetTypeError(TargetError, TypeError):
    """A name means a module of a type that cannot be adapted so."""


class AdapterError(LoricaError, ValueError):
    """An adapter does not fit: its tensors, its name, or the model it is put on."""


class FileError(LoricaError, ValueError):
    """A file of an adapter is missing, damaged, or not what it claims to be."""


class StateError(LoricaError, ValueError, RuntimeError):
    """The operation is not possible in the model's present state (merged, not adapted, ...)."""


class MissingExtra(LoricaError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class NotCarried(LoricaError, ImportError):
    """Another library has something of this name, and lorica does not."""


class LoricaWarning(UserWarning):
    """Something works, but hardly as the user meant it."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: name to import, such as ``"transformers"``.
        extra: lorica's extra that installs it, such as ``"train"``.

    Returns:
        The imported module.

    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(
            f"{module} is not installed; it comes with: pip install 'lorica[{extra}]'"
        ) from error


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Suggest the known names closest to a misspelt one, as the end of an error message.

    Returns:
        ``"; did you mean 'query', 'key'?"``, or an empty string when nothing comes close; of what is no text,
        that a name is one.
    """
    if not isinstance(name, str):
        return ", and a name is a text"
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=limit, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def listing(items: Iterable[str], *, limit: int = 20) -> str:
    """Join names for a message, cutting a long list and saying how many were left out."""
    names = list(items)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names) - limit} more)"


def lines(problems: Iterable[str], *, limit: int = 60) -> str:
    """Lay out a list of problems for a message, one on each line."""
    items = list(problems)
    rest = [f"... and {len(items) - limit} more"] if len(items) > limit else []
    return "\n".join(f"  {item}" for item in [*items[:limit], *rest])
