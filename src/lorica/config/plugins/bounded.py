r"""Does a regular expression match a module's path? In bounded time, whoever wrote the expression.

Python's own engine tries one way after another, and a pattern such as ``(a*)*b`` has as many ways as there
are subsets of the path. A configuration comes out of a file that somebody else wrote, so a pattern is
measured first. Nearly all have few ways, and are Python's to match. For the rest all ways are followed at
once, as a set of positions:

    path        e n c . q        a set of positions: bit p is set where a match may have come to p
    .*  from {0}                 {0, 1, 2, 3, 4, 5}
    then \.                      {4}

Both give the same answer; the second takes time that grows with the length of pattern and path.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

from lorica.config.patterns import ENGINES, short
from lorica.errors import ConfigError

# How CPython itself reads patterns; re has had both under these names since 3.11.
_parser: Any = re._parser  # type: ignore[attr-defined]
_compiler: Any = re._compiler  # type: ignore[attr-defined]

_EASY = 200_000
"""Steps that Python's engine may need at most where a match is left to it: about a millisecond."""
_MOST = 20_000
"""Sets of positions that a match may come to before the pattern is refused: some milliseconds."""
_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "CATEGORY", "RANGE")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")

_DOT = (re._constants.LITERAL, ord("."))  # type: ignore[attr-defined]

Item = tuple[Any, Any]
Items = Sequence[Item]


def _matched(regex: re.Pattern[str], text: str) -> bool | None:
    """Whether a costly expression matches the whole of a text; None of one that Python's engine may match."""
    made = _prepared(regex.pattern)
    return None if made.is_easy(text) else _Positions(made, text).full_match()


class _Prepared:
    """A pattern: compiled, and as a tree."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what later versions of Python may read otherwise
            self.regex = re.compile(pattern)
            self.tree = _parser.parse(pattern)
        self._easy: dict[tuple[int, int], bool] = {}
        self._keys: dict[int, str] = {}
        self._parts: dict[tuple[str, int], re.Pattern[str]] = {}

    def is_easy(self, text: str) -> bool:
        """Whether Python's engine is surely quick with a text of this length and with as many dots."""
        size = len(text).bit_length(), text.count(".").bit_length()
        if size not in self._easy:
            length, dots = (2**bits for bits in size)
            self._easy[size] = _cost(self, self.tree, length, dots)[1] <= _EASY
        return self._easy[size]

    def part(self, item: Item, flags: int) -> tuple[tuple[str, int], re.Pattern[str]]:
        """One node of the tree as a pattern of its own, with a key: Python alone decides what it takes."""
        if id(item) not in self._keys:
            self._keys[id(item)] = repr(item)
        key = self._keys[id(item)], flags
        if key not in self._parts:
            state = _parser.State()
            state.flags, state.str = flags, self.pattern
            self._parts[key] = _compiler.compile(_parser.SubPattern(state, [item]), flags)
        return key, self._parts[key]


_prepared = functools.lru_cache(maxsize=4096)(_Prepared)


def _name(item: Item) -> str:
    return str(item[0])


def _cost(made: _Prepared, items: Items, length: int, dots: int) -> tuple[float, float]:
    """The most ways in which items match from one place of a text, and the most steps to try them all."""
    ways, work = 1.0, 1.0
    for i, item in enumerate(items):
        w, k = _cost_of(made, item, length, dots)
        if _is_run(item) and i + 1 < len(items) and items[i + 1] == _DOT:
            # It can only end before a dot, and at no other where it takes no dots itself.
            _, part = made.part(item[1][2][0], made.tree.state.flags)
            w = min(w, dots + 1) if part.fullmatch(".") else 1
        work += ways * k
        ways *= w
    return ways, work


def _cost_of(made: _Prepared, item: Item, length: int, dots: int) -> tuple[float, float]:
    name, value = _name(item), item[1]
    if name == "BRANCH":
        costs = [_cost(made, branch, length, dots) for branch in value[1]]
        return sum(w for w, _ in costs), sum(k for _, k in costs)
    if name == "SUBPATTERN":
        return _cost(made, value[3], length, dots)
    if name == "ATOMIC_GROUP":
        return 1, _cost(made, value, length, dots)[1]
    if name in ("ASSERT", "ASSERT_NOT"):
        return 1, _cost(made, value[1], length, dots)[1]
    if name == "GROUPREF_EXISTS":
        costs = [_cost(made, branch or [], length, dots) for branch in value[1:]]
        return sum(w for w, _ in costs), sum(k for _, k in costs)
    if name not in _REPEATS:
        return 1, length if name.startswith("GROUPREF") else 1
    least, most, inner = int(value[0]), int(value[1]), value[2]
    w, k = _cost(made, inner, length, dots)
    width = int(inner.getwidth()[0])
    # What may be empty is repeated as often as it must be, however short the text is.
    times = min(most, length // width + 1 if width else max(length + 1, least))
    if w == 1:
        ways, work = max(1, times - least + 1), k * (times + 1)
    else:  # w ways each time: 1 + w + w² + ... of them
        ways = 1 + w if times == 1 else min(2 * min(w, 1e9) ** min(times, 30), 1e18)
        work = ways * k
    return (1 if name == "POSSESSIVE_REPEAT" else ways), work


def _is_run(item: Item) -> bool:
    """Whether it takes single characters one after another."""
    return _name(item) in _REPEATS and len(item[1][2]) == 1 and _name(item[1][2][0]) in _SINGLE


class _Positions:
    """The positions of one text that a match may have come to, as the bits of a number."""

    def __init__(self, made: _Prepared, text: str) -> None:
        self._made, self._text = made, text
        self._all = (1 << (len(text) + 1)) - 1
        self._masks: dict[tuple[str, int], int] = {}
        self._steps = 0

    def full_match(self) -> bool:
        """Whether the last position is reached from the first."""
        flags = self._made.tree.state.flags
        return bool(self._run(self._made.tree, 1, flags, True) >> len(self._text) & 1)

    def _run(self, items: Items, at: int, flags: int, forward: bool) -> int:
        """Positions that items lead to from some positions; backward, those from which they lead there."""
        for item in items if forward else reversed(items):
            if not at:
                break
            at = self._step(item, at, flags, forward)
        return at

    def _step(self, item: Item, at: int, flags: int, forward: bool) -> int:
        # A step on a very long text is more than one.
        self._steps += 1 + len(self._text) // 4096
        if self._steps > _MOST:
            raise self._refused("can match in too many ways")
        name, value = _name(item), item[1]
        if name in _SINGLE:
            mask = self._mask(item, flags)
            return (at & mask) << 1 if forward else at >> 1 & mask
        if name == "AT":
            return at & self._mask(item, flags)
        if name == "BRANCH":
            found = 0
            for branch in value[1]:
                found |= self._run(branch, at, flags, forward)
            return found
        if name == "SUBPATTERN":
            _, added, dropped, inner = value
            return self._run(inner, at, (flags | added) & ~dropped, forward)
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, inner = value
            # What follows a position decides backward, what stands before it forward.
            there = self._run(inner, self._all, flags, direction < 0)
            return at & (there if name == "ASSERT" else ~there)
        if name in _REPEATS[:2]:
            return self._repeat(value, at, flags, forward)
        if name == "FAILURE":
            return 0
        raise self._refused("repeats too much beside what refers to a group or never gives back")

    def _repeat(self, value: tuple[int, int, Items], at: int, flags: int, forward: bool) -> int:
        least, most, inner = int(value[0]), int(value[1]), value[2]
        for _ in range(least):
            before, at = at, self._run(inner, at, flags, forward)
            if at == before:
                break
        if len(inner) == 1 and _name(inner[0]) in _SINGLE and forward and most > len(self._text):
            # A carry runs through all that follow one another.
            mask = self._mask(inner[0], flags)
            return (at | (((at & mask) + mask) ^ mask)) & self._all
        reached = new = at
        for _ in range(most - least):
            new = self._run(inner, new, flags, forward) & ~reached
            if not new:
                break
            reached |= new
        return reached

    def _mask(self, item: Item, flags: int) -> int:
        """The positions before a character that the item takes, or those that it holds at."""
        key, part = self._made.part(item, flags)
        if key not in self._masks:
            text = self._text
            self._steps += len(text) // 64
            if _name(item) == "AT":
                places = [p for p in range(len(text) + 1) if part.match(text, p)]
            else:
                taken = {character for character in set(text) if part.fullmatch(character)}
                places = [p for p, character in enumerate(text) if character in taken]
            bits = bytearray(len(text) // 8 + 1)
            for p in places:
                bits[p >> 3] |= 1 << (p & 7)
            self._masks[key] = int.from_bytes(bits, "little")
        return self._masks[key]

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"the regular expression {short(self._made.pattern)!r} {why}: it might never end. Write it "
            "without repetitions inside repetitions, or list the names"
        )


ENGINES.append(_matched)
