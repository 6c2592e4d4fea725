"""Which columns a prompt is made of, and which holds what is to be written: forms of rows that are known.

Alpaca    system, instruction, input → output        prompt = the parts that are filled, a line break between
Dolly     instruction, context → response
OpenOrca  system_prompt, question → response
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from datasets import Dataset, List

from lorica.errors import ConfigError, listing
from lorica.train.columns import by_lower_case, is_text, needs_column, text_of
from lorica.train.recipe import DataConfig
from lorica.train.rows import RowError, Unusable, read_each

FORMS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("prompt", "response"),
    ("context", "completion"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "response"),
    ("question", "answer"),
    ("question", "answers"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
)
"""Columns of a prompt and of what follows it; the first pair found wins."""
SECOND = ("input", "context", "passage")
"""Columns of a second part of the prompt, beside ``instruction`` or ``question``."""
SYSTEMS = ("system", "system_prompt")
CHATS = ("messages", "conversations", "conversation")
_RAW = ("text", "content", "document", "body", "article")
"""Columns of raw text, whatever texts stand beside them."""


def find_prompt(
    rows: Dataset, data: DataConfig, forms: Sequence[tuple[str, str]] = FORMS
) -> DataConfig | None:
    """The configuration with the columns of a known form, or None where rows have none of them.

    Raises:
        ConfigError: the rows are of a form that another task, or another library, learns from.
    """
    columns = by_lower_case(rows)
    _refuse_others(rows, columns)
    for prompt, completion in forms:
        if prompt in columns and completion in columns:
            found = replace(data, text=columns[prompt], label=columns[completion])
            kind = rows.features[columns[completion]]
            if isinstance(kind, List) and data.references not in columns:
                found = replace(found, references=columns[completion])
            return add_parts(rows, found)
    return None


def add_parts(rows: Dataset, data: DataConfig) -> DataConfig:
    """The configuration with the other columns of a prompt, where rows have them and it names none."""
    columns = by_lower_case(rows)
    if data.system is None:
        data = replace(data, system=next((columns[name] for name in SYSTEMS if name in columns), None))
    taken = {data.text, data.label}
    if data.text_pair is None and str(data.text).lower() in ("instruction", "question"):
        second = next(
            (columns[name] for name in SECOND if name in columns and columns[name] not in taken), None
        )
        data = replace(data, text_pair=second)
    return data


def check_raw(rows: Dataset, column: str) -> None:
    """Refuse to take a column for raw text, unasked, where others hold texts too and its name is not usual.

    Raises:
        ConfigError: it is such.
    """
    others = [name for name in rows.column_names if name != column and is_text(rows, name)]
    if others and column.lower() not in _RAW:
        raise ConfigError(
            f"cannot tell what is learned: texts stand in the columns {listing([column, *others])}. Raw "
            "text is "
            f"--data.text COLUMN; a prompt and what follows it --data.text COLUMN --data.label COLUMN"
        )


def prompt_columns(data: DataConfig) -> list[str]:
    """Columns that a prompt is made of, in their order."""
    return [name for name in (data.system, data.text, data.text_pair) if name is not None]


def prompts_of(rows: Dataset, data: DataConfig, where: str, *, filled: bool = False) -> list[str]:
    """The prompt of each row: its parts, without those that are empty, with a line break between.

    Args:
        rows: the rows; those of plain texts have the column `data.text` alone.
        data: the columns.
        where: what to call the rows in an error.
        filled: refuse empty prompts, and rows that lack a column.

    Raises:
        ConfigError: a column is missing.
        RowError: rows have no text, or an empty one.
    """
    assert data.text is not None
    columns = prompt_columns(data)
    for name in columns if filled else [data.text]:
        needs_column(rows, name, where)
    columns = [name for name in columns if name in rows.column_names]
    if columns == [data.text]:
        texts = read_each(rows[data.text], lambda value: text_of(value, str(data.text)), where)
    else:

        def joined(values: tuple[object, ...]) -> str:
            parts = [
                text_of(value, name)
                for name, value in zip(columns, values, strict=True)
                if value is not None or name == data.text
            ]
            return "\n".join(part for part in parts if part.strip())

        texts = read_each(zip(*(rows[name] for name in columns), strict=True), joined, where)
    blank = [row for row, text in enumerate(texts) if not text.strip()] if filled else []
    if blank:
        raise RowError(blank, where, f"has an empty text in column {data.text!r}")
    return texts


def filled_text(value: object, column: str) -> str:
    """A text that is to be written.

    Raises:
        Unusable: it is none, or empty.
    """
    if not text_of(value, column).strip():
        raise Unusable(f"has nothing to learn: the text in column {column!r} is empty")
    return str(value)


def _refuse_others(rows: Dataset, columns: dict[str, str]) -> None:
    if "chosen" in columns and "rejected" in columns:
        raise ConfigError(
            "these rows are preference pairs (chosen, rejected), which TRL's DPOTrainer learns from; it "
            "takes a model "
            "adapted by lorica. To learn the chosen answers alone: --data.text prompt --data.label "
            "chosen, or "
            "--data.text chosen where they are conversations"
        )
    answers = columns.get("answers")
    if {"question", "context"} <= set(columns) and answers and "answer_start" in str(rows.features[answers]):
        raise ConfigError("these rows are SQuAD's (question, context, answers): --task question-answering")
    history = columns.get("history")
    if history and "instruction" in columns and any(rows[history]):
        raise ConfigError(
            f"column {history!r} holds earlier turns; give each conversation as one row, of a list of "
            "messages with "
            "role and content"
        )
