"""Files damaged at random, and what reading them may come to: a value, or a LoricaError, in the end."""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorica.errors import LoricaError

CASES = 2500 if os.environ.get("LORICA_EXPLORE") else 250
"""Damaged files of each format."""
STUCK = 600
"""Seconds after which a test that still reads one file is ended, with its stack: no measure, only an end."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 0.5, -0.5, 1e-320, 1e308, math.inf, math.nan),
    *(2**31, 2**63, -(2**63), 10**40, 10**400),
    *("", "x", "..", "../../x", "/", "\x00", "\ud800", "\x1b[2J", "a" * 5000, "(a*)*b", "(", "[/x]", "é"),
    *("9" * 400, "file.py:Class", "os:system", "null", "nan", "2001-99-99"),
    *([], {}, [[]], [None], ["x"], [0], [-1], [1, 2], [2, 1], {"x": 1}, {"": None}, {"x": {"y": []}}, [{}]),
    ["a", 1],
)


def generator(name: str) -> random.Random:
    """The same damage each time; other damage each time where one explores."""
    return random.Random() if os.environ.get("LORICA_EXPLORE") else random.Random(name)


def harmed(value: Any, draw: random.Random) -> Any:
    """A plain value with one to three of its parts taken away, doubled, moved or replaced."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _harmed_once(value, draw)
    return value


def _harmed_once(value: Any, draw: random.Random) -> Any:
    places = list(_places(value))
    if not places or draw.random() < 0.02:
        return copy.deepcopy(draw.choice(ODD))
    holder, key = draw.choice(places)
    way = draw.random()
    if way < 0.65:
        holder[key] = copy.deepcopy(draw.choice(ODD))
    elif way < 0.75:
        del holder[key]
    elif way < 0.85:
        other, place = draw.choice(places)
        with contextlib.suppress(LookupError):  # a part may have gone
            holder[key] = copy.deepcopy(other[place])
    elif isinstance(holder, dict):
        holder[draw.choice(("x", "", "é", "r", "\ud800", "__metadata__", f"{key} ", "../x"))] = holder[key]
    else:
        holder.append(copy.deepcopy(holder[key]))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def as_text(value: Any, draw: random.Random) -> bytes:
    """JSON, now and then damaged as a text too."""
    text = json.dumps(value, indent=draw.choice((None, 2)))
    return corrupted(text.encode(), draw) if draw.random() < 0.25 else text.encode()


def corrupted(content: bytes, draw: random.Random) -> bytes:
    """Bytes cut short, changed, repeated, or with others put in."""
    way, size = draw.randrange(6), len(content)
    at = draw.randrange(size + 1)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at:]
    if way == 2:
        return content[:at] + content[min(size, at + draw.randrange(1, 20)) :]
    if way == 3:
        deep = draw.choice((b"[", b'{"a":', b"- ")) * draw.choice((50, 200, 20_000))
        return content[:at] + deep + content[at:]
    if way == 4:
        return content[:at] + b"9" * draw.choice((20, 400, 5000)) + content[at:]
    changed = bytearray(content or b"0")
    for _ in range(draw.randrange(1, 5)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def survives(read: Callable[[], Any], what: str, keep: Path) -> bool:
    """Read a damaged file; whether a value came.

    Args:
        read: reads it.
        what: case, for the message.
        keep: the damaged file or folder, named where something else than a LoricaError comes.
    """
    faulthandler.dump_traceback_later(STUCK, exit=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except LoricaError:
        return False
    except Exception as error:
        error.add_note(f"{what}, in {keep}")
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    return True
