from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from train import tiny
from train.tasks.test_language import decoder, tokenizer

from lorica.errors import FileError
from lorica.train import Recipe, Record, RowError, evaluate, predict, prepare, train
from lorica.train.data.rows import Origin, Unusable, UsableRows, act_on_rows, read_each


def even(value: int) -> int:
    if value % 2:
        raise Unusable(f"has {value}, which is odd")
    return value // 2


def halves(rows: Dataset) -> list[int]:
    return read_each(rows["x"], even, "the rows")


def test_all_bad_rows_are_gathered() -> None:
    with pytest.raises(
        RowError, match=r"^row 2 of the rows has 3, which is odd \(and so have 1 more\)$"
    ) as found:
        read_each([2, 3, 4, 5], even, "the rows")
    assert found.value.rows == (1, 3)
    with pytest.raises(RowError, match=r"^row 1 of the rows has 1, which is odd$"):
        read_each([1, 2], even, "the rows")


def test_bad_rows_are_left_out_if_that_is_wanted() -> None:
    used = UsableRows(Dataset.from_dict({"x": [1, 2, 3, 4]}), Origin("a.csv", [9, 8, 7, 6]))
    result, kept = act_on_rows(used, halves, skip=True)
    assert (result, kept.rows["x"], kept.skipped) == ([1, 2], [2, 4], 2)
    assert kept.first == "row 10 of a.csv has 1, which is odd (and so have 1 more)"
    assert [kept.origin.number(row) for row in (0, 1)] == [9, 7]
    with pytest.raises(RowError, match=r"row 10 of a\.csv has 1"):
        act_on_rows(used, halves, skip=False)
    with pytest.raises(FileError, match=r"no row of b\.csv can be used: row 1 of b\.csv has 1"):
        act_on_rows(UsableRows(Dataset.from_dict({"x": [1, 3]}), Origin("b.csv")), halves, skip=True)


BAD: list[dict[str, Any]] = [{"text": None, "label": "good"}, {"text": "film", "label": None}]


def test_a_run_leaves_bad_rows_out_and_counts_them(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [*BAD, *tiny.sentences(20), BAD[0]]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    test = tiny.write_rows(tmp_path / "test.jsonl", [{"text": "film", "label": "new"}, *tiny.sentences(4)])
    recipe = make_recipe(max_steps=1).replace(
        data={"train": str(path), "test": str(test), "validation_fraction": 0.0, "skip_bad": True}
    )
    result = train(recipe)
    assert result.skipped == {"train": 3, "test": 1}
    assert result.rows == {"train": 20, "test": 4}
    assert Record.load(result.output).data["train"]["rows"] == 20
    out = capsys.readouterr().out
    assert f"3 train rows are left out, the first of them because row 2 of {path} has no label" in out
    assert "1 test rows are left out" in out
    assert evaluate(result.output)["rows"] == 4
    clean = tiny.write_rows(tmp_path / "clean.jsonl", tiny.sentences(20))
    again = train(recipe.replace(data={"train": str(clean)}, output=str(tmp_path / "clean")))
    assert again.adapter_sha256 == result.adapter_sha256
    with pytest.raises(RowError, match=r"row 1 of .*rows\.jsonl has nothing in column 'text'"):
        predict(result.output, path)


USER, ANSWER = {"role": "user", "content": "film"}, {"role": "assistant", "content": "great"}
REFUSING = (
    "{% for m in messages %}"
    "{% if loop.previtem is defined and loop.previtem.role == m.role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
HIDING = REFUSING.replace("in messages", "in messages[-2:]")
CONVERSATIONS: dict[str, tuple[Any, str]] = {
    "none": (None, "has no messages"),
    "of no messages": ([], "has no messages"),
    "that is a text": ("film", "has no messages"),
    "with a message that says nothing": ([{"role": "user"}, ANSWER], "has message 1, which must have a role"),
    "with a number": ([USER, {**ANSWER, "content": 5}], "has message 2, which must have a role"),
    "with no answer": ([USER], "has no message of the role 'assistant'"),
    "with an empty answer": ([USER, {**ANSWER, "content": ""}], "has nothing to learn"),
    "that the template refuses": ([USER, USER, ANSWER], "is refused by the chat template: roles must alter"),
    "that the template hides": ([USER, ANSWER, USER, ANSWER], "has an answer in message 2 .* shows nowhere"),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_a_conversation_that_cannot_be_learned_is_left_out(kind: str, tmp_path: Path) -> None:
    messages, problem = CONVERSATIONS[kind]
    decoder().save_pretrained(tmp_path / "model")
    spoken = tokenizer(HIDING if "hides" in kind else REFUSING)
    spoken.save_pretrained(tmp_path / "model")
    rows: list[dict[str, object]] = [{"messages": [USER, ANSWER]}, {"messages": messages}] * 2
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe = tiny.recipe(tmp_path / "model", data, tmp_path / "out").replace(task="causal-lm")
    recipe = recipe.replace(data={"text": "messages", "validation_fraction": 0.0})
    with pytest.raises(RowError, match=rf"row 2 of .*rows\.jsonl {problem}.*\(and so have 1 more\)"):
        prepare(recipe)
    found = prepare(recipe.replace(data={"skip_bad": True}))
    assert (len(found.splits["train"]), found.data["train"]["skipped"]) == (2, 2)
    assert re.search(problem, found.data["train"]["first_skipped"])


def test_of_conversations_some_must_be_left(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "model")
    tokenizer(REFUSING).save_pretrained(tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": [USER]}, {"messages": []}])
    recipe = tiny.recipe(tmp_path / "model", data, tmp_path / "out").replace(task="causal-lm")
    with pytest.raises(FileError, match=r"no row of .*rows\.jsonl can be used"):
        prepare(recipe.replace(data={"validation_fraction": 0.0, "skip_bad": True}))


def test_rows_in_memory_train_as_those_of_a_file(
    make_recipe: Callable[..., Recipe], tiny_data: Path, tmp_path: Path
) -> None:
    from datasets import DatasetDict, load_dataset

    names = ("train", "validation", "test")
    loaded = load_dataset("json", data_files={name: str(tiny_data / f"{name}.jsonl") for name in names})
    assert isinstance(loaded, DatasetDict)
    one = train(make_recipe(max_steps=3))
    other = train(make_recipe(max_steps=3).replace(output=str(tmp_path / "memory")), loaded)
    assert other.adapter_sha256 == one.adapter_sha256
    assert other.rows == one.rows
    with pytest.raises(FileError, match="were given in Python"):
        evaluate(other.output)
    scores = evaluate(other.output, loaded)
    assert scores.pop("rows") == 12
    assert scores == pytest.approx(one.metrics["test"], abs=1e-6)
    assert predict(other.output, loaded["test"]) == predict(one.output, tiny_data / "test.jsonl")
