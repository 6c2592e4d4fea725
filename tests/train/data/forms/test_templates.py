"""Rows laid out by a template: the text, what of it is learned, and what a template may not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from train.tasks.test_language import tokenizer

from lorica.errors import LoricaError
from lorica.train import DataConfig, tasks
from lorica.train.data.forms.templates import RowTemplate, read_template
from lorica.train.data.splits import Splits

ROW = {"question": "film story", "answer": "great", "kind": "song"}


def encoded(
    task: str = "causal-lm", rows: list[dict[str, Any]] | None = None, **data: Any
) -> tuple[Any, DataConfig]:
    table, found = Dataset.from_list(rows or [ROW]), tasks.get(task)
    config = found.resolve(Splits(table), DataConfig(**data))
    return found.encode(table, config, tokenizer(), 64, "the rows"), config


def seen(**data: Any) -> str:
    features = encoded(**data)[0].features
    words = tokenizer().convert_ids_to_tokens(features["input_ids"][0])
    labels = features["labels"][0]
    return " ".join(
        word.upper() if label != -100 else word for word, label in zip(words, labels, strict=True)
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"template": "{kind} {question} plot {answer}", "label": "answer"},
         "[CLS] song film story plot GREAT [SEP]"),
        ({"template": "{question} {answer} cast", "label": "answer"}, "[CLS] film story GREAT cast [SEP]"),
        ({"template": "{kind} {question}", "label": "answer"}, "[CLS] song film story GREAT [SEP]"),
        ({"template": "{kind} {question}"}, "[CLS] SONG FILM STORY [SEP]"),
        ({"template": "{{ kind }} {% generation %}{{ answer }}{% endgeneration %}"},
         "[CLS] song GREAT [SEP]"),
        ({"template": "{% generation %}{{ kind }}{% endgeneration %} {{ question }} "
          "{% generation %}{{ answer }}{% endgeneration %} plot"}, "[CLS] SONG film story GREAT plot [SEP]"),
        ({"template": "{% if kind == 'song' %}cast {% endif %}{{ question }}", "label": "answer"},
         "[CLS] cast film story GREAT [SEP]"),
        ({"template": "{{ question | upper | lower }}"}, "[CLS] FILM STORY [SEP]"),
        ({"template": "[CLS] {question} {answer} [SEP]", "label": "answer"}, "[CLS] film story GREAT [SEP]"),
    ],
    ids=["columns", "the label inside", "a prompt", "raw text", "Jinja", "two stretches", "a Jinja prompt",
         "raw Jinja", "its own ends"],
)  # fmt: skip
def test_the_tokens_of_a_template(data: dict[str, Any], expected: str) -> None:
    assert seen(**data) == expected


def test_a_file_is_read_and_kept_in_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "rows.jinja"
    path.write_text("{{ kind }} {{ question }}\n")
    _, config = encoded(template=str(path), label="answer")
    assert (config.template, config.text) == ("{{ kind }} {{ question }}", "kind")
    with pytest.raises(LoricaError, match=r"cannot read the template .*none\.j2: No such file"):
        read_template(str(tmp_path / "none.j2"))


def test_prompts_to_answer_are_laid_out_without_the_label() -> None:
    task: Any = tasks.get("causal-lm")
    words = tokenizer().convert_ids_to_tokens
    for template in (
        "{kind} {question} plot {answer}",
        "{{ kind }} {{ question }} plot {% generation %}{{ answer }}{% endgeneration %}",
    ):
        _, config = encoded(template=template, label="answer")
        rows = Dataset.from_list([{"question": "film story", "kind": "song"}])
        (asked,) = task.prompts(rows, config, tokenizer(), "the rows")
        assert words(asked) == ["[CLS]", "song", "film", "story", "plot"]
        (alone,) = task.prompts(task.rows(["cast"], config), config, tokenizer(), "the rows")
        assert words(alone) == ["[CLS]", "cast"]
    assert set(task.inputs(config)) == {"kind", "question"}


def test_a_text_to_read_by_a_template() -> None:
    found, _ = encoded("seq2seq-lm", template="{kind} {question}", label="answer")
    words = tokenizer().convert_ids_to_tokens
    assert words(found.features["input_ids"][0]) == ["[CLS]", "song", "film", "story", "[SEP]"]
    with pytest.raises(LoricaError, match="leave it out of the template"):
        encoded("seq2seq-lm", template="{kind} {answer}", label="answer")


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("{question} {anser}", ROW, r"no column 'anser' in the training rows; did you mean 'answer'"),
        ("plot", ROW, "data.template names no column"),
        ("{{ question", ROW, "data.template is no Jinja template"),
        ("{{ nothing }}", ROW, "reads no column of the training rows"),
        ("{{ question }} {{ nothing }}", ROW, "row 1 .* is refused by data.template: 'nothing' is und"),
        ("{question}", {"question": None}, "row 1 of the rows has nothing in column 'question'"),
        ("{question}", {"question": " "}, "row 1 of the rows is laid out by data.template as nothing"),
        ("{{ question.__class__.__mro__ }}", ROW, "is refused by data.template"),
        ("{{ question.__init__.__globals__ }}", ROW, "is refused by data.template"),
        ("{% set x = [] %}{{ x.append(1) }}{{ question }}", ROW, "is refused by data.template"),
        ("{% for i in range(10000000) %}{% endfor %}{{ question }}", ROW, "is refused by data.template"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_do(template: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        encoded(rows=[row], template=template)


def test_braces_that_name_no_column_stay_where_jinja_is_written() -> None:
    laid = RowTemplate('{"q": {question}', None).lay_out({"question": "film"})
    assert laid.text == '{"q": film'
    laid = RowTemplate('{"q": {{ question | tojson }}}').lay_out({"question": 'fi"lm'})
    assert laid.text == '{"q": "fi\\"lm"}'
