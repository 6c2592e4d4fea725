"""Books: one running text whose pieces follow on, not a text a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train.tasks.test_language import tokenizer

from lorica.train import DataConfig, tasks
from lorica.train.data import splits
from lorica.train.data.running import is_running, paragraphs

BOOK = "film story\nplot\n\ngreat song\n\n\ncast light\n"


@given(st.text(alphabet="ab \n\r\t", max_size=60))
def test_paragraphs_joined_are_the_text(text: str) -> None:
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(paragraphs(text)) == plain


def test_which_texts_run_on() -> None:
    assert is_running(BOOK)
    assert is_running(("film story " * 20 + "\n\n") * 3)
    assert not is_running("film story\n\nplot\n\ncast\n")  # a list of texts, with room between
    assert not is_running("film\nstory\nplot\n")
    assert not is_running("\n\nfilm\nstory\n\n")
    assert not is_running("film\n" * 200 + "\n" + "story\n" * 200)  # one blank line is an accident


def blocks(path: Path, limit: int, **data: Any) -> tuple[list[str], list[str], DataConfig]:
    """The training tokens and the validation tokens as texts, one a block."""
    task = tasks.get("causal-lm")
    found = splits.load(DataConfig(train=str(path), **data), running=True)
    config = task.resolve(found, DataConfig(train=str(path), **data))
    words = tokenizer().convert_ids_to_tokens
    read = [
        [
            " ".join(words(ids))
            for ids in task.encode(rows, config, tokenizer(), limit, "x").features["input_ids"]
        ]
        for _, rows in found.items()
    ]
    return read[0], read[1] if len(read) > 1 else [], config


def test_the_pieces_of_a_book_follow_on(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    train, _, config = blocks(path, 4, validation_fraction=0.0)
    assert train == ["[CLS] film story plot", "great song cast light"]
    assert config.continues == "continues"
    train, validation, _ = blocks(path, 4, validation_fraction=0.3)
    assert (train, validation) == (["[CLS] film story plot", "great song [SEP]"], ["[CLS] cast light [SEP]"])
    train, _, _ = blocks(path, 16, validation_fraction=0.0, running=False)
    lines = ("film story", "plot", "great song", "cast light")
    assert train == [" ".join(f"[CLS] {line} [SEP]" for line in lines)]


def test_a_folder_of_books_if_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(BOOK)
    (tmp_path / "b.txt").write_text("dull\n\nvoice\n")
    train, _, _ = blocks(tmp_path, 32, validation_fraction=0.0, running=True)
    assert train == ["[CLS] film story plot great song cast light [SEP] [CLS] dull voice [SEP]"]
    found = splits.load(DataConfig(train=str(tmp_path), running=True, validation_fraction=0.25))
    assert found.train["text"] == ["film story\nplot\n\n", "great song\n\n\n", "cast light\n"]


def test_other_tasks_read_a_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    assert splits.load(DataConfig(train=str(path), validation_fraction=0.0)).train.column_names == ["text"]


@pytest.mark.parametrize("rows", [2, 3])
def test_a_part_of_a_book_is_its_beginning(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    found = splits.load(DataConfig(train=str(path), validation_fraction=0.0), running=True)
    part = splits.keep_part(found.used()["train"], "train", DataConfig(train_rows=rows))
    assert list(part.rows["text"]) == list(found.train["text"])[:rows]
