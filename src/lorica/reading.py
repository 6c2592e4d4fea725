"""Reading files that others wrote: whatever is in them, the reader gets plain values or one kind of error.

A parser takes more than its user can bear: lists nested a thousand deep, numbers of four hundred digits,
halves of characters that no file can hold again. Such values fail far from the file that they came from, so
they are refused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorica.errors import FileError

DEPTH = 100
"""Levels of lists and maps inside one another: far more than any file of ours has."""
_MOST = 10_000_000
"""Values in all. A file that says one thing by many names could hold more of them than there is memory."""
_LARGEST = 10**308


def read_json(path: Path, *, halves: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        path: of the file.
        halves: as in `bearable`.

    Raises:
        FileNotFoundError: there is none; who asks knows what was looked for.
        FileError: it is damaged, or holds what is never written to such a file.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    return parse_json(content, str(path), halves=halves)


def parse_json(text: str | bytes, where: str, *, halves: bool = False) -> Any:
    """The value in a JSON text.

    Args:
        text: the JSON.
        where: what to call it in an error.
        halves: as in `bearable`.

    Raises:
        FileError: it is damaged, or holds what is never written to such a file.
    """
    try:
        return bearable(json.loads(text if isinstance(text, str) else text.decode("utf-8")), halves=halves)
    except (ValueError, RecursionError, MemoryError) as error:
        raise FileError(f"{where} cannot be read as JSON: {_reason(error)}; the file is damaged") from error


def read_object(path: Path, *, halves: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        halves: as in `bearable`.

    Raises:
        FileNotFoundError: there is none.
        FileError: it holds something else, or is damaged.
    """
    content = read_json(path, halves=halves)
    if not isinstance(content, dict):
        raise FileError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def bearable(value: Any, *, halves: bool = False) -> Any:
    """The same plain value, once it is known that it can be walked, computed with and written again.

    Args:
        value: of maps, lists, texts and numbers.
        halves: take halves of characters too, which JSON can write and read, and UTF-8 cannot hold.

    Raises:
        ValueError: it is nested too deeply, has too many parts, a number that is too large, or text with
            half of a character.
    """
    level: Iterable[Any] = [value]
    count = 0
    for _ in range(DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode("utf-8", "surrogatepass" if halves else "strict")
            elif isinstance(item, int):
                if not -_LARGEST < item < _LARGEST:
                    raise ValueError(f"a number of {item.bit_length()} bits is too large")
            elif isinstance(item, Mapping):
                below += item
                below += item.values()
            elif isinstance(item, (list, tuple, set)):
                below += item
        count += len(below)
        if count > _MOST:
            raise ValueError(f"it has more than {_MOST:,} parts")
        if not below:
            return value
        level = below
    raise ValueError(f"it is nested more than {DEPTH} deep")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "a text in it holds half of a character"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
