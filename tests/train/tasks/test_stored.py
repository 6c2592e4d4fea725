from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_reading import nobody_at_home
from train import tiny
from train.distributed import work

from lorica.errors import FileError, LoricaWarning
from lorica.train import Recipe, prepared, tasks, train
from lorica.train.tasks import stored


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path / "cache"))
    return work.write_models(tmp_path)


def language(home: Path, *, cache: bool) -> Recipe:
    return work.recipe(home, "language", {"cache": cache}, max_steps=2)


def kept(home: Path) -> list[Path]:
    return sorted((home / "cache" / "rows").iterdir())


def test_rows_are_encoded_once_and_are_the_same(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = prepared.encode(language(home, cache=False))
    first = prepared.encode(language(home, cache=True))
    places = kept(home)
    assert len(places) == 2

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(tasks.CausalLanguageModelling, "encode", never)
    again = prepared.encode(language(home, cache=True))
    for read in (first, again):
        assert read.data == plain.data
        for split, expected in plain.splits.items():
            own = read.splits[split]
            assert own.features.to_dict() == expected.features.to_dict()
            assert own.features.features == expected.features.features
            assert own.features.cache_files
            facts = ("truncated", "longest", "rows")
            assert [getattr(own, name) for name in facts] == [getattr(expected, name) for name in facts]
            assert list(own.lengths or []) == list(expected.lengths or [])
    assert kept(home) == places


def test_whatever_changes_the_encoding_is_encoded_anew(home: Path) -> None:
    made = language(home, cache=True)
    for recipe in (made, made.replace(training={"max_length": 9}), made.replace(data={"separator": " "})):
        prepared.encode(recipe)
    assert len(kept(home)) == 6
    rows = [{"prompt": "film", "completion": "warm"}, *({"prompt": "song", "completion": "cold"},) * 36]
    tiny.write_rows(home / "pairs" / "train.jsonl", rows)
    prepared.encode(made)
    assert len(kept(home)) == 7


def test_a_cache_that_cannot_be_written_is_told_and_done_without(home: Path) -> None:
    plain = prepared.encode(language(home, cache=False)).splits["train"].features.to_dict()
    (home / "cache").write_text("a file where the folder should be")
    with pytest.warns(LoricaWarning, match=rf"encoded rows are not kept: {home / 'cache'}.*LORICA_CACHE"):
        found = prepared.encode(language(home, cache=True))
    assert found.splits["train"].features.to_dict() == plain


def test_a_user_without_a_folder_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_at_home(monkeypatch)
    with pytest.warns(LoricaWarning, match="no folder of this user is known"):
        assert prepared.encode(language(home, cache=True)).splits


def test_a_run_from_the_cache_is_the_run_without(home: Path) -> None:
    silent = Console(file=io.StringIO())
    shas = {
        train(language(home, cache=cache), console=silent, overwrite=True).adapter_sha256
        for cache in (False, True, True)
    }
    assert len(shas) == 1


def test_what_cannot_be_told_is_not_kept(home: Path) -> None:
    class Own(tasks.CausalLanguageModelling):
        pass

    task, recipe = tasks.get("causal-lm"), language(home, cache=True)
    tokenizer = task.tokenizer(recipe.model)
    known = stored.key_of(task, tokenizer, recipe.data, 8, {"sha256": "a"})
    assert known is not None
    assert known != stored.key_of(task, tokenizer, recipe.data, 8, {"sha256": "b"})
    assert stored.key_of(Own(), tokenizer, recipe.data, 8, {"sha256": "a"}) is None
    assert stored.cached(None, lambda: "anew") == "anew"  # type: ignore[arg-type, return-value]


def test_a_damaged_folder_is_named(home: Path) -> None:
    encoded = prepared.encode(language(home, cache=True)).splits["train"]
    assert dataclasses.is_dataclass(encoded)
    place = kept(home)[0]
    for file in (place / "features").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(FileError, match=r"is damaged.*delete that folder"):
        stored.stored(place)
