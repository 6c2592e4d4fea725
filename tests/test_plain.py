"""JSON that every reader takes."""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorica.plain import as_json, plain


@dataclass
class Point:
    x: float
    where: Path


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("indent", [None, 2])
def test_what_it_writes_any_reader_reads(indent: int | None) -> None:
    value = {
        "loss": math.nan,
        "ends": (math.inf, -math.inf, 0.1),
        3: {"point": Point(math.nan, Path("a/b"))},
        "day": datetime.date(2026, 1, 2),
        "flag": True,
        "none": None,
        "text": "é",
    }
    text = as_json(value, indent=indent)
    assert (
        json.loads(text, parse_constant=refuse)
        == plain(value)
        == {
            "loss": None,
            "ends": [None, None, 0.1],
            "3": {"point": {"x": None, "where": "a/b"}},
            "day": "2026-01-02",
            "flag": True,
            "none": None,
            "text": "é",
        }
    )
    assert ("\n" in text) is (indent is not None)
    assert "é" in text


def test_what_has_no_form_in_json_is_refused() -> None:
    with pytest.raises(TypeError, match="set"):
        as_json({"names": {"a"}})
