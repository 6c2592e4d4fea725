"""Preferences and judged answers in the forms of public sets: the prompt and the answers that are read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from lorica.errors import LoricaError
from lorica.train import DataConfig
from lorica.train.data.forms import (
    asked_of,
    find_asked,
    find_judged,
    find_pairs,
    judged_of,
    pairs_of,
)
from lorica.train.data.tables import columns_of, table


def rows_of(*rows: dict[str, Any]) -> Dataset:
    return table(columns_of(rows))[0]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


GOOD, BAD = [bot("good")], [bot("bad")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

PAIRS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ("q", "good", "bad", None)),
    "texts that begin with the prompt": (
        {"prompt": "q? ", "chosen": "q? good", "rejected": "q? bad"},
        ("q? ", "good", "bad", None),
    ),
    "Orca's": (
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        ("s\nq", "good", "bad", None),
    ),
    "Alpaca's": (
        {"instruction": "q", "input": "i", "chosen": "good", "rejected": "bad"},
        ("q\ni", "good", "bad", None),
    ),
    "HH's, alone": (
        {"chosen": "\n\nHuman: q\n\nAssistant: I do", "rejected": "\n\nHuman: q\n\nAssistant: It is"},
        ("\n\nHuman: q\n\nAssistant:", " I do", " It is", None),
    ),
    "texts that share nothing": ({"chosen": "good", "rejected": "bad"}, ("", "good", "bad", None)),
    "one the start of the other": ({"chosen": "a b c", "rejected": "a b"}, ("a", " b c", " b", None)),
    "messages": ({"prompt": [user("q")], "chosen": GOOD, "rejected": BAD}, ([user("q")], GOOD, BAD, None)),
    "messages, alone": (
        {"chosen": [user("q"), *GOOD], "rejected": [user("q"), *BAD]},
        ([user("q")], GOOD, BAD, None),
    ),
    "several turns, alone": (
        {
            "chosen": [user("q"), bot("a"), user("r"), *GOOD],
            "rejected": [user("q"), bot("a"), user("r"), *BAD],
        },
        ([user("q"), bot("a"), user("r")], GOOD, BAD, None),
    ),
    "UltraFeedback's": (
        {"prompt": "q", "chosen": [user("q"), *GOOD], "rejected": [user("q"), *BAD], "score_chosen": 8.0},
        ([user("q")], GOOD, BAD, None),
    ),
    "a text and messages": ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, ([user("q")], GOOD, BAD, None)),
    "messages and texts": (
        {"prompt": [user("q")], "chosen": "good", "rejected": "bad"},
        ([user("q")], GOOD, BAD, None),
    ),
    "messages that begin with the prompt": (
        {"prompt": [user("q")], "chosen": [user("q"), *GOOD], "rejected": [user("q"), *BAD]},
        ([user("q")], GOOD, BAD, None),
    ),
    "ShareGPT's": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        ([user("q")], GOOD, BAD, None),
    ),
    "OpenAI's": (
        {"input": {"messages": [user("q")]}, "preferred_output": GOOD, "non_preferred_output": BAD},
        ([user("q")], GOOD, BAD, None),
    ),
    "JSON in cells": (
        {"prompt": json.dumps([user("q")]), "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
        ([user("q")], GOOD, BAD, None),
    ),
    "with a system and tools": (
        {"system": "s", "prompt": [user("q")], "chosen": GOOD, "rejected": BAD, "tools": [TOOL]},
        ([{"role": "system", "content": "s"}, user("q")], GOOD, BAD, [TOOL]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_prompt_and_the_answers_of_a_pair(name: str) -> None:
    row, expected = PAIRS[name]
    rows = rows_of(row, row)
    assert [tuple(pair) for pair in pairs_of(rows, find_pairs(rows, DataConfig()), "the rows")] == (
        [expected] * 2
    )


JUDGED: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "texts": ({"prompt": "q", "completion": "good", "label": True}, ("q", "good", True, None)),
    "a number": ({"prompt": "q", "response": "bad", "label": 0}, ("q", "bad", False, None)),
    "a word": ({"question": "q", "answer": "bad", "verdict": "False"}, ("q", "bad", False, None)),
    "messages": (
        {"prompt": [user("q")], "completion": GOOD, "label": True},
        ([user("q")], GOOD, True, None),
    ),
    "a conversation": ({"messages": [user("q"), *BAD], "label": False}, ([user("q")], BAD, False, None)),
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_prompt_the_answer_and_the_verdict(name: str) -> None:
    row, expected = JUDGED[name]
    rows = rows_of(row)
    (found,) = judged_of(rows, find_judged(rows, DataConfig()), "the rows")
    assert tuple(found) == expected


def test_prompts_alone_are_those_of_any_form_without_its_answer() -> None:
    for row, expected in (
        ({"prompt": "q", "answer": "42"}, "q"),
        ({"instruction": "q", "input": "i", "system": "s"}, "s\nq\ni"),
        ({"messages": [user("q"), *GOOD]}, [user("q")]),
    ):
        rows = rows_of(row)
        assert [each.prompt for each in asked_of(rows, find_asked(rows, DataConfig()), "x")] == [expected]


def test_named_columns_go_before_usual_ones() -> None:
    rows = rows_of({"q": "a", "prompt": "b", "up": "good", "down": "bad", "chosen": "x", "rejected": "y"})
    data = find_pairs(rows, DataConfig(text="q", chosen="up", rejected="down"))
    assert pairs_of(rows, data, "x")[0][:3] == ("a", "good", "bad")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "row 2 of the rows has the same answer twice"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "row 2 .* nothing in column 'rejected', where"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "row 2 .* has an empty answer"),
        ({"prompt": "q", "chosen": "a"}, "row 2 .* nothing in column 'rejected'"),
    ],
)  # fmt: skip
def test_rows_without_two_answers_are_refused_by_their_number(row: dict[str, Any], message: str) -> None:
    rows = rows_of({"prompt": "q", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(LoricaError, match=message):
        pairs_of(rows, find_pairs(rows, DataConfig()), "the rows")


def test_what_cannot_be_told_is_asked_for() -> None:
    rows = rows_of({"prompt": "q", "completion": "a", "label": "perhaps"})
    with pytest.raises(LoricaError, match=r"--data\.chosen and --data\.rejected"):
        find_pairs(rows, DataConfig())
    with pytest.raises(LoricaError, match=r"row 1 .* has 'perhaps' in column 'label', where true or false"):
        judged_of(rows, find_judged(rows, DataConfig()), "the rows")
    with pytest.raises(LoricaError, match=r"--data\.verdict"):
        find_judged(rows_of({"prompt": "q", "completion": "a"}), DataConfig())
    with pytest.raises(LoricaError, match="no column 'choosen'"):
        find_pairs(rows, DataConfig(chosen="choosen"))
    asks = rows_of({"chosen": [user("q"), user("r")], "rejected": [user("q"), *BAD]})
    with pytest.raises(LoricaError, match="last message is not the assistant's"):
        pairs_of(asks, find_pairs(asks, DataConfig()), "the rows")
