"""Odd rows of every form: the tokens and what is learned, by hand, or an error that says which row."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train.tasks.test_language import TEMPLATE, tokenizer

from lorica.errors import LoricaError
from lorica.train import DataConfig, Recipe, tasks
from lorica.train.data.splits import Splits
from lorica.train.data.tables import columns_of, table
from lorica.train.preview import preview
from lorica.train.settings import PostConfig

CALL = {"function": {"name": "film", "arguments": "{}"}}
CALLS = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first or m.role == 'tool' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def say(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(text: str) -> dict[str, Any]:
    return say("user", text)


def bot(text: str | None, **more: Any) -> dict[str, Any]:
    return say("assistant", text, **more)


def read(task: str, *rows: dict[str, Any], limit: int = 32, template: str = TEMPLATE, **data: Any) -> Any:
    """The encoded rows."""
    found, data_config = tasks.get(task), DataConfig(**data)
    if task == "grpo":
        found.post = PostConfig(max_new_tokens=4)  # type: ignore[attr-defined]
        found.max_length = limit  # type: ignore[attr-defined]
    held = table(columns_of(rows))[0]
    data_config = found.resolve(Splits(held), replace(data_config))
    return found.encode(held, data_config, tokenizer(template), limit, "rows.jsonl").features


def words(ids: list[int]) -> str:
    return " ".join(tokenizer().convert_ids_to_tokens(ids))


def learned(features: Any, row: int = 0) -> str:
    """A row with what is learned in double brackets."""
    said = features[row]
    if "labels" not in said:
        names = ("chosen_ids", "rejected_ids", "completion_ids")
        answers = " | ".join(f"⟦{words(said[name])}⟧" for name in names if name in said)
        return f"{words(said['prompt_ids'])} {answers}".strip()
    tokens = tokenizer().convert_ids_to_tokens(said["input_ids"])
    marked = (f"⟦{t}⟧" if label != -100 else t for t, label in zip(tokens, said["labels"], strict=True))
    return " ".join(marked).replace("⟧ ⟦", " ")


ODD: dict[str, tuple[str, dict[str, Any], str]] = {
    # The tiny vocabulary has no roles: [UNK].
    "a system alone before the answer": (
        "causal-lm",
        {"messages": [say("system", "film"), bot("great")]},
        "[UNK] film [UNK] ⟦great⟧",
    ),
    # No template lays out a conversation of nothing, so what opens the first answer is learned with it.
    "the assistant begins": (
        "causal-lm",
        {"messages": [bot("great"), user("film"), bot("dull")]},
        "⟦[UNK] great⟧ [UNK] film [UNK] ⟦dull⟧",
    ),
    "two answers in a row": (
        "causal-lm",
        {"messages": [user("film"), bot("great"), bot("dull")]},
        "[UNK] film [UNK] ⟦great⟧ [UNK] ⟦dull⟧",
    ),
    "an empty system": (
        "causal-lm",
        {"messages": [say("system", ""), user("film"), bot("great")]},
        "[UNK] [UNK] film [UNK] ⟦great⟧",
    ),
    "letters beyond ASCII": (
        "causal-lm",
        {"prompt": "film \u00e9\U0001f3ac", "completion": "great \u200b\u5b57"},
        "[CLS] film [UNK] [UNK] ⟦great [UNK] [UNK] [SEP]⟧",
    ),
    "judged in words": (
        "preference",
        {"prompt": "film", "completion": "great", "label": "TRUE"},
        "[CLS] film ⟦great [SEP]⟧",
    ),
    "judged by a number in a text": (
        "preference",
        {"prompt": "film", "completion": "great", "label": "1.0"},
        "[CLS] film ⟦great [SEP]⟧",
    ),
    "answers without a prompt": (
        "preference",
        {"chosen": "great", "rejected": "dull"},
        "[CLS] ⟦great [SEP]⟧ | ⟦dull [SEP]⟧",
    ),
    "the assistant begins, in a pair": (
        "preference",
        {"chosen": [bot("great")], "rejected": [bot("dull")]},
        "⟦[UNK] great⟧ | ⟦[UNK] dull⟧",
    ),
    "an answer of several turns": (
        "preference",
        {"chosen": [user("film"), bot("great"), user("song"), bot("warm")],
         "rejected": [user("film"), bot("dull")]},
        "[UNK] film [UNK] ⟦great [UNK] song [UNK] warm⟧ | ⟦dull⟧",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_tokens_and_what_is_learned_by_hand(name: str) -> None:
    task, row, expected = ODD[name]
    assert learned(read(task, row, row), 1) == expected


def test_a_call_of_a_tool_without_a_word_is_an_answer() -> None:
    row = {
        "prompt": [user("film")],
        "chosen": [bot(None, tool_calls=[CALL])],
        "rejected": [bot("dull", tool_calls=None)],
    }
    assert learned(read("preference", row, template=CALLS)) == "[UNK] film [UNK] ⟦film⟧ | ⟦dull⟧"


@pytest.mark.parametrize("task", ["preference", "reward"])
def test_a_very_long_row_keeps_the_start_of_its_answers(task: str) -> None:
    row = {"prompt": "film " * 500, "chosen": "great " * 20, "rejected": "dull"}
    found = read(task, row, limit=8)
    if task == "reward":
        # Each is a text by itself; what is not read of the one is read of the other.
        assert words(found[0]["chosen_ids"]) == "film" + 7 * " great"
        assert words(found[0]["rejected_ids"]) == "film film film film film film dull [SEP]"
    else:
        assert learned(found) == "film ⟦great great great great great great great⟧ | ⟦dull [SEP]⟧"


def test_a_very_long_prompt_loses_its_start() -> None:
    features = read("grpo", {"prompt": "film " * 500 + "song"}, limit=8)
    assert features["length"] == [8]


def pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": "film", "chosen": chosen, "rejected": rejected}


def judged(label: Any) -> dict[str, Any]:
    return {"prompt": "film", "completion": "dull", "label": label}


def talk(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


NO_MESSAGES = "has no messages.*column 'messages'"
NOTHING = "nothing to answer in column 'prompt'"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no messages": ("causal-lm", {"messages": []}, NO_MESSAGES),
    "null": ("causal-lm", {"messages": None}, NO_MESSAGES),
    "a text among messages": ("causal-lm", {"messages": "film"}, NO_MESSAGES),
    "a system alone": ("causal-lm", talk(say("system", "film")), "no message of the role 'assistant'"),
    "an empty answer": ("causal-lm", talk(user("film"), bot("")), "the assistant's message 2 is empty"),
    "no content": ("causal-lm", talk(user("film"), bot(None)), "has message 2.*column 'messages'"),
    "both alike": ("preference", pair("dull", "dull"), "the same answer twice"),
    "no answer": ("reward", pair("dull", None), "nothing in column 'rejected'"),
    "only spaces": ("reward", pair("dull", " \n"), "empty answer"),
    "no verdict": ("preference", judged("perhaps"), "'perhaps' in column 'label'"),
    "nothing asked": ("grpo", {"prompt": ""}, NOTHING),
    "asked by the assistant alone": ("grpo", {"prompt": [bot("film")]}, NOTHING),
}

GOOD: dict[str, dict[str, Any]] = {
    "messages": talk(user("film"), bot("great")),
    "completion": judged("true"),
    "chosen": pair("great", "dull"),
    "prompt": {"prompt": "film"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_is_refused_by_its_row_and_column(name: str) -> None:
    task, row, message = REFUSED[name]
    good = next(good for key, good in GOOD.items() if key in row)
    if name == "asked by the assistant alone":
        good = {"prompt": [user("film")]}
    with pytest.raises(LoricaError, match=f"row 2 of .*{message}"):
        read(task, good, row)


TOLD = {"prompt": [user("film"), say("tool", "song")]}
ANSWERS = {"chosen": [bot("great")], "rejected": [bot("dull")]}


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("causal-lm", {"messages": [*TOLD["prompt"], bot("great")]}),
        ("preference", {**TOLD, **ANSWERS}),
        ("preference", {**TOLD, "completion": [bot("great")], "label": True}),
        ("reward", {**TOLD, **ANSWERS}),
        ("grpo", TOLD),
    ],
)
def test_what_a_chat_template_refuses_is_refused_by_its_row(task: str, row: dict[str, Any]) -> None:
    name = "messages" if "messages" in row else "prompt"
    good = {**row, name: [user("film"), *([bot("great")] if name == "messages" else [])]}
    with pytest.raises(LoricaError, match=r"row 2 of .* is refused by the chat template: .*alternate"):
        read(task, good, row, template=STRICT)


def test_such_a_row_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    tokenizer(STRICT).save_pretrained(tmp_path)
    recipe = Recipe(task="preference", model=str(tmp_path))
    recipe = recipe.replace(data={"skip_bad": True, "validation_fraction": 0.0})
    rows = [{"prompt": [user("film")], **ANSWERS}, {**TOLD, **ANSWERS}, {"prompt": "film", **ANSWERS}]
    found = preview(recipe, rows).splits["train"]
    assert (found.rows, found.skipped) == (2, 1)


def test_forms_mixed_in_one_file_are_refused_by_the_first_row_of_the_other() -> None:
    rows = [{"messages": [user("film"), bot("great")]}, {"prompt": "film", "completion": "great"}]
    with pytest.raises(LoricaError, match=r"row 2 of rows\.jsonl has no messages"):
        read("causal-lm", *rows, text="messages")
    with pytest.raises(LoricaError, match=r"row 1 of rows\.jsonl"):
        read("causal-lm", *rows)


GREAT, DULL, FILM = [bot("great")], [bot("dull")], [user("film")]
CHATS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("causal-lm", {"messages": FILM + GREAT}, {}),
    ("causal-lm", {"dialog": FILM + GREAT}, {"text": "dialog"}),
    ("causal-lm", {"name": "x", "dialog": FILM + GREAT}, {}),
    ("causal-lm", {"dialog": json.dumps(FILM + GREAT)}, {"text": "dialog"}),
    ("causal-lm", {"prompt": FILM, "completion": "great"}, {}),
    ("causal-lm", {"prompt": FILM, "completion": GREAT}, {}),
    ("causal-lm", {"prompt": "film", "completion": GREAT}, {}),
    ("causal-lm", {"prompt": "film", "completion": "great"}, {"messages": True}),
    ("preference", {"prompt": FILM, "chosen": GREAT, "rejected": DULL}, {}),
    ("preference", {"prompt": "film", "chosen": GREAT, "rejected": DULL}, {}),
    ("preference", {"chosen": FILM + GREAT, "rejected": FILM + DULL}, {}),
    ("preference", {"prompt": "film", "chosen": "great", "rejected": "dull"}, {"messages": True}),
    ("preference", {"prompt": FILM, "completion": GREAT, "label": True}, {}),
    ("preference", {"prompt": "film", "completion": GREAT, "label": True}, {}),
    ("preference", {"dialog": FILM + GREAT, "label": True}, {"text": "dialog"}),
    ("preference", {"prompt": "film", "completion": "great", "label": True}, {"messages": True}),
    ("grpo", {"prompt": FILM}, {}),
    ("grpo", {"dialog": FILM}, {"text": "dialog"}),
    ("rloo", {"prompt": FILM}, {}),
    ("rloo", {"prompt": "film"}, {"messages": True}),
]
"""Rows that are conversations in one way or another: a task, a row, and what is said of its columns."""


def settled(task: str, row: dict[str, Any], **data: Any) -> tuple[Any, Any, DataConfig]:
    """A task, its rows, and what was found of their columns."""
    found, held = tasks.get(task), table(columns_of([row, row]))[0]
    return found, held, found.resolve(Splits(held), DataConfig(**data))


@pytest.mark.parametrize(("task", "row", "data"), CHATS)
def test_a_text_is_what_a_user_says_where_conversations_were_learned(
    task: str, row: dict[str, Any], data: dict[str, Any]
) -> None:
    found, held, config = settled(task, row, **data)
    assert config.messages is True
    if task in ("grpo", "rloo"):
        learned_from, _ = found.prompts(held, config, tokenizer(TEMPLATE), "the rows")
    else:
        features = found.encode(held, config, tokenizer(TEMPLATE), 32, "the rows").features
        if task == "preference":
            learned_from = features["prompt_ids"][0]
        else:
            ids, labels = features["input_ids"][0], features["labels"][0]
            learned_from = [token for token, label in zip(ids, labels, strict=True) if label == -100]
    assert words(learned_from) == "[UNK] film [UNK]"
    (asked,) = found.prompts(found.rows(["film"], config), config, tokenizer(TEMPLATE), "the rows")
    assert asked == learned_from
    # So does a file of rows whose prompts are texts.
    column = config.text or "prompt"
    (read,) = found.prompts(table({column: ["film"]})[0], config, tokenizer(TEMPLATE), "the rows")
    assert read == learned_from
    # A recipe travels as YAML; earlier ones knew the usual names alone.
    assert DataConfig(**dataclasses.asdict(config)) == config
    (before,) = found.rows(["film"], replace(config, messages=None))[column]
    assert before == (FILM if config.text == "messages" and config.label is None else "film")


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ({"prompt": FILM, "chosen": GREAT, "rejected": DULL}, {}),
        ({"prompt": "film", "chosen": GREAT, "rejected": DULL}, {}),
        ({"chosen": FILM + GREAT, "rejected": FILM + DULL}, {}),
        ({"prompt": "film", "chosen": "great", "rejected": "dull"}, {"messages": True}),
        ({"prompt": "film", "chosen": "great", "rejected": "dull"}, {}),
    ],
)
def test_a_text_is_scored_as_it_was_learned(row: dict[str, Any], given: dict[str, Any]) -> None:
    found, held, config = settled("reward", row, **given)
    expected = found.encode(held, config, tokenizer(TEMPLATE), 32, "the rows").features["chosen_ids"][0]
    asked = [found.rows(["film\tgreat"], config)]
    chats = bool(config.messages)
    if chats:
        asked += [table({"answer": [FILM + GREAT]})[0]] if config.text is None else []
        asked += [table({"prompt": [FILM], "answer": ["great"]})[0]]
        asked += [table({"prompt": [FILM + GREAT]})[0]] if config.text else []
    for rows in asked:
        encoded = found.encode(rows, config, tokenizer(TEMPLATE), 32, "the rows", labelled=False)
        assert encoded.features["input_ids"] == [expected]
    assert chats == (words(expected) == "[UNK] film [UNK] great")


def test_texts_stay_texts() -> None:
    for task, row in [
        ("causal-lm", {"prompt": "film", "completion": "great"}),
        ("causal-lm", {"text": "film"}),
        ("preference", {"prompt": "film", "chosen": "great", "rejected": "dull"}),
        ("grpo", {"prompt": "film"}),
    ]:
        found, _, config = settled(task, row)
        assert config.messages is None
        (plain,) = found.rows(["film"], config)[config.text]
        assert plain == "film"
