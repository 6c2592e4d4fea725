"""Conversations by chat templates of several kinds: the tokens of each row, those learned in capitals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset
from train.tasks.test_language import TEMPLATE, tokenizer

from lorica.errors import LoricaError
from lorica.train import DataConfig, tasks
from lorica.train.data.splits import Splits
from lorica.train.data.tables import columns_of, table
from lorica.train.tasks.conversations import conversation_pieces, pieces_of

OWN_MASK = (
    "{% for m in messages %}{% if m.role == 'assistant' %}plot {% generation %}{{ m.content }} song"
    "{% endgeneration %} {% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}plot {% endif %}"
)
"""Says which tokens are the assistant's."""

FORGETS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}plot "
    "{% if loop.last %}cold {% endif %}{{ m.content }} song {% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}plot {% endif %}"
)
"""As Qwen3's: the last answer has its reasoning's mark (cold), which earlier ones have lost."""

CALLS = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.content }} {% for c in m.tool_calls or [] %}"
    "{{ c.function.name }} {% for k, v in c.function.arguments.items() %}{{ k }} {{ v }} {% endfor %}"
    "{% endfor %}{% endfor %}"
)


def rows_of(*rows: dict[str, Any]) -> Dataset:
    return table(columns_of(rows))[0]


def seen(rows: Dataset, template: str, **data: Any) -> list[str]:
    task, words = tasks.get("causal-lm"), tokenizer().convert_ids_to_tokens
    config = task.resolve(Splits(rows), DataConfig(**data))
    features = task.encode(rows, config, tokenizer(template), 64, "the rows").features
    return [
        " ".join(
            token.upper() if label != -100 else token for token, label in zip(words(ids), labels, strict=True)
        )
        for ids, labels in zip(features["input_ids"], features["labels"], strict=True)
    ]


def turns(*says: str, **more: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text, **more} for place, text in enumerate(says)]


TALK = turns("film", "great", "story", "dull light")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, "[UNK] film [UNK] GREAT [UNK] story [UNK] DULL LIGHT"),
        (OWN_MASK, "film plot GREAT SONG story plot DULL LIGHT SONG"),
        (FORGETS, "film plot GREAT SONG story plot COLD DULL LIGHT SONG"),
    ],
    ids=["growing", "the template's own mask", "a template that changes earlier turns"],
)
def test_several_turns(template: str, expected: str) -> None:
    assert seen(rows_of({"messages": TALK}), template) == [expected]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, "[UNK] film [UNK] great [UNK] story [UNK] DULL LIGHT"),
        (OWN_MASK, "film plot great song story plot DULL LIGHT SONG"),
        (FORGETS, "film plot great song story plot COLD DULL LIGHT SONG"),
    ],
)
def test_messages_of_weight_0_are_read_and_not_learned(template: str, expected: str) -> None:
    messages = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
    assert seen(rows_of({"messages": messages}), template) == [expected]


def test_what_follows_the_last_answer_is_left_out() -> None:
    for template in (TEMPLATE, OWN_MASK, FORGETS):
        whole = seen(rows_of({"messages": TALK}), template)
        assert seen(rows_of({"messages": [*TALK, *turns("warm")]}), template) == whole


TOOLS = [
    {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "song"}},
]
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "song", "arguments": json.dumps({"warm": "cold"})}}
]}  # fmt: skip
ANSWERED = [
    {"role": "tool", "tool_call_id": "1", "content": "plot"},
    {"role": "assistant", "content": "great"},
]
LEARNED_CALL = "film SONG WARM COLD plot GREAT"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*turns("film"), CALL, *ANSWERED]}, LEARNED_CALL),
        ({"messages": [*turns("film"), CALL, *ANSWERED], "tools": TOOLS}, f"light song {LEARNED_CALL}"),
        ({"messages": [*turns("film"), CALL, *ANSWERED], "tools": json.dumps([TOOLS[1]["function"]])},
         f"song {LEARNED_CALL}"),
        ({"messages": [*turns("film"), {"role": "assistant", "function_call": {
            "name": "song", "arguments": {"warm": "cold"}}}, *ANSWERED]},
         LEARNED_CALL),
        ({"conversations": [
            {"from": "human", "value": "film"},
            {"from": "function_call", "value": '{"name": "song", "arguments": {"warm": "cold"}}'},
            {"from": "observation", "value": "plot"},
            {"from": "gpt", "value": "great"}]}, LEARNED_CALL),
    ],
    ids=["OpenAI's", "with tools", "with tools in JSON", "OpenAI's of one function", "ShareGPT's"],
)  # fmt: skip
def test_calls_of_tools(row: dict[str, Any], expected: str) -> None:
    # Another row with other arguments: a table would give each call the keys of both.
    other = json.loads(json.dumps(row).replace("warm", "film"))
    found = seen(rows_of(row, other), CALLS)
    assert found == [expected, expected.replace("WARM", "FILM")]


def spelled(who: str, what: str, user: str, assistant: str) -> list[dict[str, str]]:
    return [{who: user, what: "film"}, {who: assistant, what: "great"}]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"conversations": spelled("from", "value", "human", "gpt")}, "ShareGPT"),
        ({"conversation": spelled("role", "content", "user", "assistant")}, "messages"),
        ({"conversations": spelled("role", "value", "human", "gpt")}, "messages"),
        ({"messages": spelled("speaker", "text", "User", "Bot")}, "messages"),
        ({"prompt": "film", "completion": turns("", "great")[1:]}, "of messages"),
        ({"prompt": turns("film"), "completion": "great"}, "of messages"),
    ],
)  # fmt: skip
def test_spellings_of_one_conversation_read_the_same(row: dict[str, Any], form: str) -> None:
    rows = rows_of(row)
    assert seen(rows, TEMPLATE) == ["[UNK] film [UNK] GREAT"]
    task = tasks.get("causal-lm")
    assert form in task.notes(rows, task.resolve(Splits(rows), DataConfig()))[0]


def test_an_evaluation_writes_from_before_the_last_answer() -> None:
    # The template ends each turn behind the learned part, and that is no prompt.
    task, rows = tasks.get("causal-lm"), rows_of({"messages": TALK})
    config = task.resolve(Splits(rows), DataConfig())
    features = task.encode(rows, config, tokenizer(OWN_MASK), 64, "the rows").features
    assert (features["prompt_tokens"][0], features["reference"][0]) == (6, "dull light")
    prompts: Any = task
    (asked,) = prompts.prompts(rows, config, tokenizer(OWN_MASK), "the rows")
    assert asked == features["input_ids"][0][:6]


def test_a_template_that_hides_an_answer_is_refused() -> None:
    hides = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(LoricaError, match=r"row 1 of the rows has an answer in message 2 .* shows nowhere"):
        seen(rows_of({"messages": TALK}), hides)


def test_a_template_of_the_reasoning_kind_learns_each_turn_it_shows() -> None:
    says = [{"role": "assistant", "content": "great"}, {"role": "assistant", "content": "dull"}]
    pieces = conversation_pieces(tokenizer("{{ messages | length }} " + TEMPLATE), says)
    words = tokenizer().convert_ids_to_tokens
    learned = [words(ids) for ids, target in pieces if target]
    assert [word for stretch in learned for word in stretch if word != "[UNK]"] == ["great", "dull"]


def test_a_token_over_the_edge_of_what_is_learned_belongs_to_where_it_ends() -> None:
    tokens = tokenizer()
    text = "film story great"
    for start, learned in ((0, 3), (4, 2), (5, 2), (6, 2), (11, 1), (16, 0)):
        pieces = pieces_of(tokens, text, [(start, len(text))] if start < len(text) else [])
        assert sum(len(ids) for ids, target in pieces if target) == learned
        assert [t for ids, _ in pieces for t in ids] == tokens(text, add_special_tokens=False)["input_ids"]
