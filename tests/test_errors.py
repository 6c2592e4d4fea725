"""Errors: their kinds, and the helpers that word them."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import pytest

from lorica import errors
from lorica.errors import LoricaError, MissingExtra, lines, listing, nearest, require


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("TargetError", ValueError),
        ("AdapterError", ValueError),
        ("FileError", ValueError),
        ("StateError", RuntimeError),
        ("MissingExtra", ImportError),
    ],
)
def test_each_is_also_the_builtin_that_a_caller_would_catch(name: str, builtin: type[Exception]) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, LoricaError)
    assert issubclass(kind, builtin)


def test_every_error_derives_from_one() -> None:
    own = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]
    assert own
    assert all(
        issubclass(item, LoricaError | UserWarning) for item in own if not hasattr(builtins, item.__name__)
    )


class TestRequire:
    def test_what_is_installed(self) -> None:
        assert require("json", extra="train") is sys.modules["json"]

    @pytest.mark.parametrize("module", ["surely_not_installed", "surely_not_installed.part"])
    def test_what_is_not_names_the_extra(self, module: str) -> None:
        with pytest.raises(MissingExtra, match=rf"{module} is not installed; .*'lorica\[tune\]'"):
            require(module, extra="tune")

    def test_a_dependency_that_lacks_one_of_its_own_says_so_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "half_installed.py").write_text("import surely_not_installed\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError) as error:
            require("half_installed", extra="train")
        assert not isinstance(error.value, MissingExtra)
        assert error.value.name == "surely_not_installed"


class TestWording:
    def test_the_nearest_names(self) -> None:
        assert nearest("qurey", ["dense", "query", "value"]) == "; did you mean 'query'?"

    def test_none_near(self) -> None:
        assert nearest("xyz", ["query"]) == ""

    def test_no_more_than_asked_for_and_each_once(self) -> None:
        assert nearest("a1", ["a1", "a1", "a2", "a3", "a4"], limit=2) == "; did you mean 'a1', 'a4'?"

    def test_a_long_listing_says_how_much_it_leaves_out(self) -> None:
        assert listing("abc", limit=3) == "a, b, c"
        assert listing("abcde", limit=3) == "a, b, c, ... (2 more)"
        assert listing([]) == ""

    def test_a_long_list_of_problems_too(self) -> None:
        assert lines(["one", "two"]) == "  one\n  two"
        assert lines("abc", limit=1) == "  a\n  ... and 2 more"
