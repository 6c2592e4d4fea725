"""Rows that stay on disk: the tokens of rows in memory, and runs that go on to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from train import tiny
from train.tasks.test_language import LM, TEMPLATE, decoder, run, tokenizer

from lorica.errors import ConfigError, FileError, LoricaError
from lorica.train import DataConfig, Recipe, train
from lorica.train.data.mapped import mapped_rows
from lorica.train.data.rows import fingerprint_on_disk
from lorica.train.prepared import encode, lines, prepare


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def recipe(folder: Path, rows: list[dict[str, Any]], template: str | None = None, **data: Any) -> Recipe:
    made = run(LM, folder, decoder(), rows)
    tokenizer(template).save_pretrained(folder / "model")
    return made.replace(data={"streaming": True, "validation_fraction": 0.25, **data})


PROMPTS = [{"prompt": row["text"], "completion": row["label"]} for row in tiny.sentences(24)]
TALKS = [
    {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
    for row in tiny.sentences(24)
]
TEXTS = [{"text": row["text"]} for row in tiny.sentences(24)]


@pytest.mark.parametrize("rows", [PROMPTS, TALKS, TEXTS], ids=["prompts", "conversations", "raw text"])
def test_a_batch_has_the_tokens_of_the_rows_in_memory(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    made = recipe(tmp_path, rows, TEMPLATE, validation_fraction=0.0)
    lazy: Any = encode(made).splits["train"].features
    found = lazy.__getitems__([7, 3, 20])
    whole = encode(made.replace(data={"streaming": False})).splits["train"].features
    if rows is TEXTS:  # in memory these are joined; here each is a sequence
        words = tokenizer().convert_ids_to_tokens
        for place, features in zip((7, 3, 20), found, strict=True):
            assert words(features["input_ids"]) == ["[CLS]", *rows[place]["text"].split(), "[SEP]"]
            assert features["labels"] == features["input_ids"]
        return
    for place, features in zip((7, 3, 20), found, strict=True):
        for name in ("input_ids", "labels", "attention_mask"):
            assert features[name] == whole[place][name]
    assert lazy[-1]["input_ids"] == whole[23]["input_ids"]


def test_a_run_from_disk_is_told_repeats_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    made = recipe(tmp_path, PROMPTS).replace(training={"batch_size": 4, "max_steps": 6, "save_steps": 3})
    told = "\n".join(lines(prepare(made)))
    assert (
        "rows.jsonl: 18 rows stay on disk, and are encoded when it is their turn; of the first 18, 0 are cut"
        in told
    )
    whole = train(made)
    assert whole.rows == {"train": 18, "validation": 6}
    again = made.replace(output=str(tmp_path / "again"))
    stopped = train(again)
    assert stopped.adapter_sha256 == whole.adapter_sha256
    (tmp_path / "again" / "adapter_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-6")
    assert train(again, resume=True).adapter_sha256 == whole.adapter_sha256


def test_a_row_that_cannot_be_used_is_named_when_it_is_its_turn(tmp_path: Path) -> None:
    rows = [*PROMPTS, *PROMPTS]
    rows[30] = {"prompt": "film", "completion": " "}
    made = recipe(tmp_path, rows, validation_fraction=0.0)
    with pytest.raises(LoricaError, match=r"row 31 of .*rows\.jsonl has nothing to learn"):
        encode(made)  # it is among the first
    skipping: Any = encode(made.replace(data={"skip_bad": True})).splits["train"].features
    assert len(skipping.__getitems__([29, 30, 31])) == 2
    with pytest.raises(LoricaError, match=r"row 31 of .*rows\.jsonl has nothing to learn"):
        skipping.__getitems__([30])


def test_cells_of_a_csv_file_are_the_texts_that_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n01,NA\n"a, b",1.10\n')
    (tmp_path / "b.tsv").write_text('x\t"y\n')
    (tmp_path / "c.txt").write_text("film\nsong\n")
    assert list(mapped_rows(tmp_path / "a.csv", "csv", None, None)) == [
        {"prompt": "01", "completion": "NA"},
        {"prompt": "a, b", "completion": "1.10"},
    ]
    assert list(mapped_rows(tmp_path / "b.tsv", "tsv", None, ["p", "q"])) == [{"p": "x", "q": '"y'}]
    assert list(mapped_rows(tmp_path / "c.txt", "text", None, None)) == [{"text": "film"}, {"text": "song"}]
    with pytest.raises(FileError, match="cannot stay on disk"):
        mapped_rows(tmp_path / "a.xlsx", "xlsx", None, None)
    (tmp_path / "d.jsonl").write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(FileError, match=r"cannot read .*d\.jsonl as json, row by row"):
        mapped_rows(tmp_path / "d.jsonl", "json", None, None)


def test_other_rows_have_another_fingerprint() -> None:
    rows = datasets.Dataset.from_list([{"a": str(number)} for number in range(50)])
    same = datasets.Dataset.from_list([{"a": str(number)} for number in range(50)])
    other = datasets.Dataset.from_list([{"a": str(number)} for number in range(49)] + [{"a": "x"}])
    one = fingerprint_on_disk(rows)
    assert one == fingerprint_on_disk(same)
    assert one != fingerprint_on_disk(other)
    part = fingerprint_on_disk(rows.select([1, 5, 9]))
    assert part["rows"] == 3
    assert part["sha256"] not in (one["sha256"], fingerprint_on_disk(rows.select([1, 5, 8]))["sha256"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sequence-classification"}, "streaming is for language tasks; sequence-classification"),
        ({"training": {"packing": True}}, r"training\.packing needs all rows at once"),
        ({"training": {"auto_batch_size": True}}, r"training\.auto_batch_size needs all rows at once"),
    ],
)
def test_what_needs_all_rows_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made = Recipe(task=LM, data=DataConfig(train="x.jsonl", streaming=True), output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=message):
        encode(made.replace(**changes))
