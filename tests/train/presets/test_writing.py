"""Presets of what is learned by writing: every copy of a set gives the paper's own lines."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lorica.errors import LoricaError
from lorica.train import DataConfig, Recipe, presets
from lorica.train.data.splits import load

MR = "name[Blue Spice], eatType[pub], priceRange[£20-25], familyFriendly[no], customer rating[low]"
TABLE = "name : Blue Spice | Type : pub | price : £ 20 - 25 | family friendly : no | customer rating : low"
TRIPLES = [["Aarhus", "leaderName", "Jacob"], ["Aarhus", "Area", "91 : 2"]]
HEADER = ["No.", "Title"]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("e2e", {"context": "a", "completion": "b", "mr": MR}, {"context": "a", "completion": "b"}),
        ("e2e", {"context": "a", "references": ["b", "c"]}, {"context": "a", "references": ["b", "c"]}),
        ("e2e", {"meaning_representation": MR, "human_reference": "b"},
            {"context": TABLE, "completion": "b"}),
        ("e2e", {"mr": MR, "ref": "b"}, {"context": TABLE, "completion": "b"}),
        ("e2e", {"meaning_representation": MR, "target": "b", "references": ["b", "c"]},
            {"context": TABLE, "completion": "b", "references": ["b", "c"]}),
        ("webnlg", {"input": ["Aarhus | leaderName | Jacob", "Aarhus | Area | 91 : 2"], "target": "b"},
            {"context": "Aarhus : leaderName : Jacob | Aarhus : Area : 91 : 2", "completion": "b"}),
        ("webnlg", {"modified_triple_sets": {"mtriple_set": [["Aarhus | leaderName | Jacob"]]},
                    "lex": {"text": ["b", "c"], "comment": ["good", "bad"]}},
            {"context": "Aarhus : leaderName : Jacob", "completion": None, "references": ["b"]}),
        ("dart", {"tripleset": TRIPLES, "target": "b", "references": ["c"]},
            {"context": "Aarhus : leadername : Jacob | Aarhus : area : 91 : 2", "completion": "b",
             "references": ["c"]}),
        ("dart", {"tripleset": TRIPLES[:1], "annotations": {"text": ["b", "c"], "source": ["", ""]}},
            {"context": "Aarhus : leadername : Jacob", "completion": None, "references": ["b", "c"]}),
        ("wikisql", {"question": "Which?", "columns": HEADER, "sql": "SELECT No. FROM table"},
            {"context": "No. | Title\nWhich?", "completion": "SELECT No. FROM table"}),
        ("wikisql", {"question": "Which?", "table": {"header": HEADER}, "sql": {"human_readable": "SELECT"}},
            {"context": "No. | Title\nWhich?", "completion": "SELECT"}),
        ("samsum", {"dialogue": "A: Hi!\r\nB: Bye.", "summary": "They met."},
            {"context": "A: Hi!\nB: Bye.", "completion": "They met."}),
    ],
)  # fmt: skip
def test_a_row_of_any_copy(name: str, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert presets.lay_out(Dataset.from_list([row]), name)[0] == expected


def test_tables_are_the_lines_of_the_papers_own_file(data_dir: Path) -> None:
    for split in ("train", "valid", "test"):
        with gzip.open(data_dir / "e2e_nlg" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for _, line in zip(range(700), lines, strict=False)]
        found = presets.lay_out(Dataset.from_list([{"mr": row["mr"], "ref": ""} for row in rows]), "e2e")
        assert list(found["context"]) == [row["context"] for row in rows]


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("e2e", "e2e_nlg", ("train", "valid", "test")),
        ("webnlg", "webnlg", ("train", "valid", "test")),
        ("dart", "dart", ("train_from_dev", "valid_from_dev", "test")),
        ("wikisql", "wikisql_subset", ("train", "valid", "test")),
    ],
)
def test_files_by_a_preset(name: str, folder: str, files: tuple[str, str, str], data_dir: Path) -> None:
    train, validation, test = (str(data_dir / folder / f"{file}.jsonl.gz") for file in files)
    splits = load(DataConfig(preset=name, train=train, validation=validation, test=test))
    for rows in (splits.train, splits.validation, splits.test):
        assert rows is not None
        assert "context" in rows.column_names
        assert {"completion", "references"} & set(rows.column_names)


def test_what_a_preset_fills_in() -> None:
    recipe = presets.apply(
        Recipe(data=DataConfig(preset="e2e", train="mine.jsonl")).replace(generation={"num_beams": 2})
    )
    assert (recipe.task, recipe.data.text, recipe.data.label) == ("causal-lm", "context", "completion")
    assert recipe.data.train == "mine.jsonl"
    assert recipe.generation.metrics == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    assert (recipe.generation.num_beams, recipe.generation.no_repeat_ngram_size) == (2, 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "the preset 'dart' finds no column 'tripleset' in rows of text"),
        ({"tripleset": None}, "row 1 of the rows is no row of 'dart'"),
    ],
)
def test_rows_of_another_set(row: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        presets.lay_out(Dataset.from_list([row]), "dart")


def test_rows_of_another_form_are_left_out_if_that_is_wanted() -> None:
    good = {"tripleset": [["a", "B", "c"]], "target": "x"}
    rows = Dataset.from_list([{**good, "tripleset": None}, *[good] * 5])
    config = DataConfig(preset="dart", validation_fraction=0.0)
    with pytest.raises(LoricaError, match="row 1 of the train rows is no row of 'dart'"):
        load(config, rows)
    used = load(dataclasses.replace(config, skip_bad=True), rows).used()["train"]
    assert (len(used.rows), used.skipped, used.origin.number(0)) == (5, 1, 2)
    assert used.first is not None
    assert used.first.startswith("row 1 of the train rows is no row of 'dart'")
