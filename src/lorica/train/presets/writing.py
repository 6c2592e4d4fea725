"""Data sets that are learned by writing, laid out as in the LoRA paper: tables, triples, questions, talks.

Each takes the columns of the set's copies on the Hub, and ``context`` with ``completion`` or ``references``,
as the paper's own files have them. Decoding is that of its table 11: ten beams, no run of four tokens twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorica.train.presets.base import Preset, Row, register

_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}

_SLOT = re.compile(r"(\w[\w ]*)\[(.*?)\]")

_BEAMS = {"num_beams": 10, "no_repeat_ngram_size": 4}


def table(row: Row) -> Row:
    """E2E: ``name : Blue Spice | Type : pub | price : £ 20 - 25``."""
    if "context" in row:
        return _kept(row)
    slots = _SLOT.findall(
        str(row["meaning_representation"] if "meaning_representation" in row else row["mr"])
    )
    said = " | ".join(f"{_NAMES.get(name, name)} : {_spaced(value)}" for name, value in slots)
    return _pair(said, row, "human_reference", "target", "ref")


def web_triples(row: Row) -> Row:
    """WebNLG: ``subject : property : object | ...``, of the modified triples."""
    if "context" in row:
        return _kept(row)
    if "modified_triple_sets" in row:
        triples = row["modified_triple_sets"]["mtriple_set"][0]
        good = [t for t, c in zip(row["lex"]["text"], row["lex"]["comment"], strict=True) if c == "good"]
        return {"context": _triples(triples), "completion": None, "references": good}
    return _pair(_triples(row["input"]), row, "target")


def record_triples(row: Row) -> Row:
    """DART: ``subject : relation : object | ...``, relations in lower case."""
    if "context" in row:
        return _kept(row)
    said = _triples([(s, relation.lower(), o) for s, relation, o in row["tripleset"]])
    if "annotations" in row:
        return {"context": said, "completion": None, "references": list(row["annotations"]["text"])}
    return _pair(said, row, "target")


def query(row: Row) -> Row:
    """WikiSQL: the table's columns, then the question; the query in words as its authors print it."""
    if "context" in row:
        return _kept(row)
    columns = row["columns"] if "columns" in row else row["table"]["header"]
    sql = row.get("sql")
    sql = sql["human_readable"] if isinstance(sql, Mapping) else sql
    return {"context": f"{' | '.join(columns)}\n{row['question']}", "completion": sql}


def dialogue(row: Row) -> Row:
    """SAMSum: the utterances, one per line."""
    if "context" in row:
        return _kept(row)
    return {"context": "\n".join(str(row["dialogue"]).splitlines()), "completion": row.get("summary")}


def _kept(row: Row) -> Row:
    return {name: row[name] for name in ("context", "completion", "references") if name in row}


def _pair(context: str, row: Row, *completions: str) -> Row:
    completion = next((row[name] for name in completions if name in row), None)
    found = {"context": context, "completion": completion}
    return {**found, "references": list(row["references"])} if row.get("references") is not None else found


def _triples(triples: Sequence[Any]) -> str:
    parts = [triple.split(" | ") if isinstance(triple, str) else triple for triple in triples]
    return " | ".join(" : ".join(part) for part in parts)


def _spaced(value: str) -> str:
    return re.sub(r"(\d)-(\d)", r"\1 - \2", value.replace("£", "£ "))


def _register(
    name: str, about: str, data: Mapping[str, Any], row: Any, generation: Mapping[str, Any]
) -> None:
    columns = {"text": "context", "label": "completion"}
    register(
        name, Preset(about, "causal-lm", {**data, **columns}, row=row, generation={**_BEAMS, **generation})
    )


_register(
    "e2e",
    "restaurants: a sentence that says what a table holds",
    {"train": "tuetschek/e2e_nlg"},
    table,
    {"metrics": ["bleu", "nist", "meteor", "rouge_l", "cider"], "length_penalty": 0.9},
)

_register(
    "webnlg",
    "a text that says what triples of an encyclopedia hold",
    {"train": "webnlg-challenge/web_nlg", "subset": "webnlg_challenge_2017"},
    web_triples,
    {"metrics": ["bleu", "meteor", "ter"], "length_penalty": 0.8, "max_new_tokens": 100},
)

_register(
    "dart",
    "a text that says what triples of many tables hold",
    {"train": "Yale-LILY/dart"},
    record_triples,
    {"metrics": ["bleu", "meteor", "ter"], "length_penalty": 0.8, "max_new_tokens": 100},
)

_register(
    "wikisql",
    "a question on a table, as an SQL query",
    {"train": "Salesforce/wikisql"},
    query,
    {"metrics": ["logical_form"], "num_beams": 1, "no_repeat_ngram_size": 0},
)

_register(
    "samsum",
    "what a dialogue comes to",
    {"train": "knkarthick/samsum", "separator": "\n\n"},
    dialogue,
    {"metrics": ["rouge"], "num_beams": 1, "no_repeat_ngram_size": 0},
)
