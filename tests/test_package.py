"""The package's own door: what stands in it, and what is fetched when it is asked for."""

from __future__ import annotations

import subprocess
import sys

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


def test_the_core_starts_without_what_it_may_not_need() -> None:
    code = "import sys, lorica; print(*sorted(sys.modules)); lorica.study.spectrum, lorica.algebra.add"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(loaded.stdout.split())
    assert "lorica.model.adapt" in modules
    assert not {"lorica.study", "lorica.algebra", "lorica.checkpoint.stream", "transformers"} & modules
