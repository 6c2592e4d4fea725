"""The text that the small decoder of bench/ reads."""

from __future__ import annotations

import gzip
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def plain_text(monkeypatch: pytest.MonkeyPatch) -> Any:
    for needed in ("transformers", "tokenizers"):
        pytest.importorskip(needed, reason="needs: pip install 'lorica[train]'")
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module("plain_text")


@pytest.mark.parametrize(
    ("split", "whole"),
    [
        (" = = Early life = = \n", "Early life"),
        ("A 17 @-@ match run of 1 @,@ 500 at 2 @.@ 5 % .", "A 17-match run of 1,500 at 2.5%."),
        ("In 2002 – 03 he ( a poet ) wasn 't there ; I didn 't go .", None),
        ('He called it " a dull film " , and left .', 'He called it "a dull film", and left.'),
        ("The town 's mayor paid $ 5 : they 've won !", "The town's mayor paid $5: they've won!"),
        ("It was <unk> . It rained . A <unk> came . He left .", "It rained. He left."),
        ("It cost 5 m . by then .", "It cost 5 m. by then."),
    ],
)
def test_wikitext_as_print_has_it(plain_text: Any, split: str, whole: str | None) -> None:
    found = plain_text.clean_wikitext(split)
    assert found == whole if whole is not None else "(a poet)" in found


def test_a_novel_without_its_marks(plain_text: Any) -> None:
    text = "“I am _very_ glad,” he said--\n\n* * *\n\nIt’s late."
    assert plain_text.clean_book(text) == '"I am very glad," he said—\nIt\'s late.'


def test_tokens_give_the_text_back_and_end_each(plain_text: Any) -> None:
    texts = ["A café in the city – cheap.", "Naïve?\nYes."]
    tokenizer = plain_text.train_tokenizer(texts, 300, 64)
    stream = plain_text.encode(tokenizer, texts)
    assert stream.dtype == np.uint16
    assert tokenizer.decode(stream) == plain_text.END.join([*texts, ""])
    assert tokenizer(" cheap")["input_ids"] == tokenizer.encode(" cheap", add_special_tokens=False)


def test_documents_leave_out_what_cleaning_leaves_empty(plain_text: Any, tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    with gzip.open(tmp_path / "wikitext2" / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ("A <unk> .", "It rained ."))
    assert list(plain_text.documents(tmp_path, "train", "wikitext2")) == ["It rained."]
    with pytest.raises(SystemExit, match=r"no file .*books"):
        list(plain_text.documents(tmp_path, "train", "books"))
