"""The package's own door: what stands in it, and what is fetched when it is asked for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lorica
import lorica.study.planning


def test_what_is_imported_later_is_the_thing_itself() -> None:
    assert lorica.plan is lorica.study.planning.plan
    assert lorica.algebra is sys.modules["lorica.algebra"]
    assert {"algebra", "plan", "study", "adapt"} <= set(dir(lorica))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'lorica' has no attribute 'adpat'"):
        _ = lorica.adpat  # type: ignore[attr-defined]


def _loaded(code: str) -> set[str]:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_core_starts_without_what_it_may_not_need() -> None:
    modules = _loaded("import sys, lorica; lorica.adapt; print(*sys.modules); lorica.study.spectrum")
    assert "lorica.model.adapt" in modules
    assert not {"lorica.study", "lorica.algebra", "lorica.checkpoint.stream", "transformers"} & modules


def test_names_are_imported_when_they_are_used() -> None:
    assert "torch" not in _loaded("import sys, lorica, lorica.cli; print(*sys.modules)")
    assert "torch" in _loaded("import sys, lorica; lorica.LoraConfig, lorica.save; print(*sys.modules)")


def test_what_type_checkers_see_is_what_there_is() -> None:
    """The imports for type checkers and the table of places name the same things in the same places."""
    source = ast.parse(Path(lorica.__file__).read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If))
    seen = {
        (alias.name, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name, _ in seen} == set(lorica.__all__)
    for name, module in seen:
        assert module is not None
        found = getattr(importlib.import_module(module), name)
        assert getattr(lorica, name) is found
        if module != "lorica":
            assert f"lorica.{lorica._PLACE_OF[name]}" == module
