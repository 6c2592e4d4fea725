"""Rows that are encoded a part at a time, in one process and in several, against all at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from datasets import Dataset
from train import tiny

from lorica.errors import ConfigError
from lorica.train import DataConfig, tasks
from lorica.train.data.rows import RowError
from lorica.train.tasks.parts import HowEncoded, encode_in_parts

TEXTS = [row["text"] for row in tiny.sentences(50)]
ROWS = {
    "text": TEXTS[:40] + TEXTS[:10],  # prompts that come again
    "answer": TEXTS[::-1],
    "label": ["good", "bad"] * 25,
    "words": [text.split() for text in TEXTS],
    "tags": [["good"] * len(text.split()) for text in TEXTS],
    "messages": [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "fine"}] for text in TEXTS
    ],
}
CASES: dict[str, tuple[str, DataConfig]] = {
    "classes": ("sequence-classification", DataConfig(text="text", label="label", labels=["bad", "good"])),
    "words": ("token-classification", DataConfig(text="words", label="tags", labels=["bad", "good"])),
    "prompts": ("causal-lm", DataConfig(text="text", label="answer")),
    "a template": ("causal-lm", DataConfig(text="text", label="answer", template="{text} film {answer}")),
    "conversations": ("causal-lm", DataConfig(text="messages")),
    "texts to write": ("seq2seq-lm", DataConfig(text="text", label="answer")),
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def how(task: str, data: DataConfig) -> HowEncoded:
    tokenizer: Any = tiny.tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "[SEP]"
    return HowEncoded(tasks.get(task), data, tokenizer, 8, "the rows")


@pytest.mark.parametrize("name", CASES)
def test_parts_are_encoded_as_all_rows_at_once(name: str) -> None:
    task, data = CASES[name]
    rows = Dataset.from_dict(ROWS)
    whole = how(task, data).of(rows)
    found = encode_in_parts(how(task, data), rows, 16)
    assert len(found.features.data.table.column(0).chunks) > 1
    _same(found, whole)


def test_processes_change_no_byte() -> None:
    task, data = CASES["prompts"]
    rows = Dataset.from_dict(ROWS)
    one = encode_in_parts(how(task, data), rows, 16)
    two = encode_in_parts(how(task, dataclasses.replace(data, processes=2)), rows, 16)
    _same(two, one)
    assert [len(chunk) for chunk in two.features.data.table.column(0).chunks] == [16, 16, 16, 2]


def test_bad_rows_are_told_by_their_numbers_among_all() -> None:
    task, data = CASES["prompts"]
    rows = Dataset.from_dict({**ROWS, "text": [*TEXTS[:20], "", *TEXTS[21:40], "", *TEXTS[41:]]})
    with pytest.raises(RowError, match=r"row 21 of the rows has an empty text .*and so have 1 more") as said:
        encode_in_parts(how(task, data), rows, 16)
    assert said.value.rows == (20, 40)


def test_rows_that_depend_on_one_another_take_one_process() -> None:
    data = DataConfig(text="text")
    rows = Dataset.from_dict({"text": TEXTS})
    _same(encode_in_parts(how("causal-lm", data), rows, 16), how("causal-lm", data).of(rows))
    with pytest.raises(ConfigError, match=r"data.processes is for rows .* leave it out"):
        encode_in_parts(how("causal-lm", dataclasses.replace(data, processes=2)), rows, 16)
    with pytest.raises(ConfigError, match="processes must be more than 0"):
        DataConfig(processes=0)


def _same(found: Any, expected: Any) -> None:
    assert found.features.to_dict() == expected.features.to_dict()
    for name in ("truncated", "longest", "rows"):
        assert getattr(found, name) == getattr(expected, name), name
    assert list(found.lengths) == list(expected.lengths)
