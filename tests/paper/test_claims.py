"""docs/paper.md has every row, and what its rows point to is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lorica.cli import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "paper.md").read_text(encoding="utf-8")
SECTIONS = {"A": 21, "B": 10, "C": 14, "D": 17, "E": 1, "F": 12, "G": 20, "H": 19, "I": 9, "J": 6}
FOLDERS = ("tests", "bench", "docs", "examples", "recipes", "src")

ROWS = [(row[1], row[2]) for row in re.finditer(r"^\| ([A-J]\d+) \|.*\| (.*) \|$", PAGE, re.MULTILINE)]


@cache
def names(path: Path) -> frozenset[str]:
    """The functions of a file, its classes, and their functions."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found.update(f"{node.name}::{f.name}" for f in node.body if isinstance(f, ast.FunctionDef))
    return frozenset(found)


def shown_by(text: str) -> list[str]:
    """What is wrong with the names in a text: files, tests and commands that are not there."""
    problems = []
    for span in re.findall(r"`([^`]+)`", text):
        if span.startswith("lorica "):
            if span.split()[1] not in COMMANDS:
                problems.append(f"there is no command {span}")
        elif span.split("/")[0] in FOLDERS:
            file, _, test = span.partition("::")
            if not (REPOSITORY / file).exists():
                problems.append(f"there is no {file}")
            elif test and test not in names(REPOSITORY / file):
                problems.append(f"{file} has no {test}")
    return problems


def test_every_row_is_there_once() -> None:
    expected = [f"{letter}{i}" for letter, count in SECTIONS.items() for i in range(1, count + 1)]
    assert [number for number, _ in ROWS] == expected


@pytest.mark.parametrize(("number", "text"), ROWS, ids=[number for number, _ in ROWS])
def test_a_row_is_shown_or_says_why_not(number: str, text: str) -> None:
    assert not shown_by(text)
    points = re.search(r"`(?:(?:tests|bench|docs|examples|recipes)/|lorica )", text)
    others = [other for other in re.findall(r"\b[A-J]\d+\b", text) if other != number]
    assert points or text.startswith("Not here: ") or others
    assert set(others) <= {row for row, _ in ROWS}


def test_the_rest_of_the_page_points_to_what_is_there() -> None:
    assert not shown_by(PAGE)


def test_what_is_not_there_is_found_out() -> None:
    assert shown_by("`tests/paper/test_claims.py::test_none`, `bench/none.py`, `lorica none`") == [
        "tests/paper/test_claims.py has no test_none",
        "there is no bench/none.py",
        "there is no command lorica none",
    ]
