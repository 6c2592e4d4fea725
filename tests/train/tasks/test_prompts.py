"""Rows in the forms of public sets of instructions and conversations: the tokens that the model sees."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset
from train.tasks.test_language import TEMPLATE, tokenizer

from lorica.errors import LoricaError
from lorica.train import DataConfig, tasks
from lorica.train.data.rows import Origin, UsableRows
from lorica.train.data.splits import Splits
from lorica.train.data.tables import columns_of, table
from lorica.train.prepared import notes_on

LM, S2S = "causal-lm", "seq2seq-lm"


def rows_of(*rows: dict[str, Any]) -> Dataset:
    return table(columns_of(rows))[0]


def resolved(rows: Dataset, task: str = LM, **data: Any) -> DataConfig:
    return tasks.get(task).resolve(Splits(rows), DataConfig(**data))


def seen(rows: Dataset, task: str = LM, **data: Any) -> list[str]:
    """The tokens of each row as one text, targets in capitals."""
    config = resolved(rows, task, **data)
    features = tasks.get(task).encode(rows, config, tokenizer(TEMPLATE), 64, "the rows").features
    words = tokenizer().convert_ids_to_tokens
    return [
        " ".join(
            token.upper() if label != -100 else token for token, label in zip(words(ids), labels, strict=True)
        )
        for ids, labels in zip(features["input_ids"], features["labels"], strict=True)
    ]


ALPACA = {"instruction": "film", "input": "story", "output": "great"}
TURN = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "great"}]
SHARED = [{"from": "human", "value": "film"}, {"from": "gpt", "value": "great"}]
SYSTEM = {"role": "system", "content": "warm"}

# "user", "assistant" and "system" are no words of the tokenizer's.
SAID = "[UNK] film [UNK] GREAT"
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "Alpaca": (ALPACA, "[CLS] film story GREAT [SEP]"),
    "Alpaca without an input": ({**ALPACA, "input": ""}, "[CLS] film GREAT [SEP]"),
    "Alpaca with an input of nothing": ({**ALPACA, "input": None}, "[CLS] film GREAT [SEP]"),
    "Alpaca with a system": ({"system": "warm", **ALPACA}, "[CLS] warm film story GREAT [SEP]"),
    "Alpaca with the text of both": ({**ALPACA, "text": "film song"}, "[CLS] film story GREAT [SEP]"),
    "Dolly": (
        {"instruction": "film", "context": "story", "response": "great", "category": "x"},
        "[CLS] film story GREAT [SEP]",
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "warm", "question": "film", "response": "great"},
        "[CLS] warm film GREAT [SEP]",
    ),
    "a question and an answer": ({"question": "film", "answer": "great"}, "[CLS] film GREAT [SEP]"),
    "with a text to look in": (
        {"question": "film", "context": "story", "answer": "great"},
        "[CLS] film story GREAT [SEP]",
    ),
    "several answers": ({"question": "film", "answers": ["great"]}, "[CLS] film GREAT [SEP]"),
    "completions": ({"prompt": "film", "completion": "great"}, "[CLS] film GREAT [SEP]"),
    "input and output": ({"input": "film", "output": "great"}, "[CLS] film GREAT [SEP]"),
    "OpenAI's messages": ({"messages": TURN}, SAID),
    "with a system": ({"messages": [SYSTEM, *TURN]}, f"[UNK] warm {SAID}"),
    "with a column of a system": ({"messages": TURN, "system": "warm"}, f"[UNK] warm {SAID}"),
    "with both": ({"messages": [SYSTEM, *TURN], "system": "cold"}, f"[UNK] warm {SAID}"),
    "with parts": (
        {"messages": [TURN[0], {"role": "assistant", "content": [{"type": "text", "text": "great"}]}]},
        SAID,
    ),
    "with weights": (
        {"messages": [TURN[0], {**TURN[1], "weight": 0}, TURN[0], {**TURN[1], "weight": 1}]},
        f"[UNK] film [UNK] great {SAID}",
    ),
    "ShareGPT": ({"id": "7", "conversations": SHARED}, SAID),
    "ShareGPT with a system": ({"conversations": SHARED, "system": "warm"}, f"[UNK] warm {SAID}"),
    "JSON in a cell": ({"messages": json.dumps(TURN)}, SAID),
    "Python in a cell": ({"conversations": repr(SHARED)}, SAID),
    "TRL's conversational completions": (
        {"prompt": [TURN[0], TURN[1], TURN[0]], "completion": [TURN[1]]},
        f"[UNK] film [UNK] great {SAID}",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_tokens_of_a_known_form(name: str) -> None:
    row, expected = FORMS[name]
    if name == "Alpaca with an input of nothing":
        assert seen(rows_of(row, ALPACA))[0] == expected
    else:
        assert seen(rows_of(row)) == [expected]


def test_a_named_column_goes_before_a_form() -> None:
    row = {**ALPACA, "text": "film song", "chosen": "a", "rejected": "b"}
    assert seen(rows_of(row), text="text") == ["[CLS] FILM SONG [SEP]"]
    assert seen(rows_of(row), text="input", label="output") == ["[CLS] story GREAT [SEP]"]


def test_a_prompt_of_several_parts_is_one_question_only_if_all_are_alike() -> None:
    rows = rows_of(ALPACA, {**ALPACA, "input": "song"}, {**ALPACA, "output": "dull"})
    config = resolved(rows)
    assert (config.text, config.text_pair, config.label) == ("instruction", "input", "output")
    features = tasks.get(LM).encode(rows, config, tokenizer(), 64, "the rows").features
    assert list(features["group"]) == [0, 1, 0]


def test_prompts_to_answer_are_made_as_those_to_learn() -> None:
    task: Any = tasks.get(LM)
    rows = rows_of({"system": "warm", **ALPACA})
    config = resolved(rows)
    words = tokenizer().convert_ids_to_tokens
    (asked,) = task.prompts(rows, config, tokenizer(), "the rows")
    assert words(asked) == ["[CLS]", "warm", "film", "story"]
    (plain,) = task.prompts(task.rows(["film"], config), config, tokenizer(), "the rows")
    assert words(plain) == ["[CLS]", "film"]


def test_a_text_made_of_several_parts() -> None:
    rows = rows_of(ALPACA)
    features = tasks.get(S2S).encode(rows, resolved(rows, S2S), tokenizer(), 64, "the rows").features
    words = tokenizer().convert_ids_to_tokens
    assert words(features["input_ids"][0]) == ["[CLS]", "film", "story", "[SEP]"]
    assert words(features["labels"][0]) == ["[CLS]", "great", "[SEP]"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs .* --task preference"),
        ({"chosen": TURN, "rejected": TURN}, "preference pairs"),
        (
            {"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}},
            "--task question-answering",
        ),
        ({**ALPACA, "history": [["a", "b"]]}, "column 'history' holds earlier turns"),
        ({"question": "a film", "reply": "b song"}, "texts stand in the columns question, reply"),
        ({"title": "a film", "abstract": "b song"}, "cannot tell what is learned"),
        ({**ALPACA, "instruction": " ", "input": ""}, "row 1 .* has an empty text in column 'instruction'"),
        ({**ALPACA, "output": " "}, "row 1 .* has nothing to learn: the text in column 'output' is empty"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "message 1 from 'nobody'; known are"),
        (
            {"messages": [TURN[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "a call of a tool without a name in message 2",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURN[1]]},
            "has a part 'image_url' in message 1",
        ),
        (
            {"messages": [TURN[0], {**TURN[1], "content": " "}]},
            "nothing to learn: the assistant's message 2 is empty",
        ),
        ({"messages": [{**TURN[0], "content": ""}, TURN[1]]}, "empty text: the user's message 1 is empty"),
        ({"messages": [TURN[0], {**TURN[1], "weight": 0}]}, "no message of the role 'assistant'"),
        ({"messages": [TURN[0], {**TURN[1], "weight": 0.5}]}, "has the weight 0.5 in message 2"),
    ],
)
def test_what_is_refused_says_what_to_do(row: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        seen(rows_of(row))


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"messages": TURN}, "causal-lm"),
        (ALPACA, "causal-lm"),
        ({"question": "a", "context": "b", "answers": {"text": ["b"]}}, "question-answering"),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "token-classification"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--task preference"),
    ],
)
def test_the_default_task_says_which_one_learns_from_a_known_form(row: dict[str, Any], task: str) -> None:
    with pytest.raises(LoricaError, match=rf"cannot tell which column .* Rows of this form are for .*{task}"):
        resolved(rows_of(row), "sequence-classification")


def test_empty_texts_are_left_out_of_raw_text_and_that_is_told() -> None:
    rows = rows_of({"text": "film"}, {"text": " "}, {"text": ""}, {"text": "song"})
    config = resolved(rows)
    encoded = tasks.get(LM).encode(rows, config, tokenizer(), 64, "the rows")
    words = tokenizer().convert_ids_to_tokens(encoded.features["input_ids"][0])
    assert words == ["[CLS]", "film", "[SEP]", "[CLS]", "song", "[SEP]"]
    assert len(encoded) == 2
    assert notes_on(tasks.get(LM), config, UsableRows(rows, Origin("a.txt"))) == [
        "a.txt: its rows are raw text (text), of which every token is learned",
        "a.txt: 2 empty texts are left out",
    ]


def test_columns_that_are_not_read_are_named() -> None:
    rows = rows_of({"id": "1", "system": "warm", **ALPACA, "source": "x"})
    told = notes_on(tasks.get(LM), resolved(rows), UsableRows(rows, Origin("a.csv")), training=True)
    assert told == [
        "a.csv: its rows are Alpaca's form (system + instruction + input → output)",
        "a.csv: columns that are not read: id, source",
    ]
    rows = rows_of(
        {"text": "film", "label": "a", "date": "2024"}, {"text": "song", "label": "b", "date": "2024"}
    )
    task = tasks.get("sequence-classification")
    config = task.resolve(Splits(rows), DataConfig())
    assert notes_on(task, config, UsableRows(rows, Origin("a.csv")), training=True) == [
        "a.csv: columns that are not read: date"
    ]
