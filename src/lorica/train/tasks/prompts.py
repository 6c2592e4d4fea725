"""The parts of a prompt: their columns, and the text that they make together."""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import Dataset

from lorica.train.data.columns import needs_column, text_of
from lorica.train.data.forms.templates import Laid, template_of
from lorica.train.data.rows import RowError, Unusable, read_each
from lorica.train.settings import DataConfig

_UNKNOWN = "\ue9a5"
"""A label that is not there."""


def prompt_columns(data: DataConfig) -> list[str]:
    """Columns that a prompt is made of, in their order."""
    if data.template is not None:
        return [name for name in template_of(data.template, data.label).columns if name != data.label]
    return [name for name in (data.system, data.text, data.text_pair) if name is not None]


def prompts_of(rows: Dataset, data: DataConfig, where: str, *, filled: bool = False) -> list[str]:
    """The prompt of each row: its parts, without those that are empty, with a line break between.

    Args:
        rows: the rows; those of plain texts have the column `data.text` alone.
        data: the columns.
        where: name of the rows in errors.
        filled: refuse empty prompts, and rows that lack a column.

    Raises:
        ConfigError: a column is missing.
        RowError: rows have no text, or an empty one.
    """
    assert data.text is not None
    if data.template is not None:
        return [laid.prompt for laid in laid_out(rows, data, where, filled=filled)]
    columns = prompt_columns(data)
    for name in columns if filled else [data.text]:
        needs_column(rows, name, where)
    columns = [name for name in columns if name in rows.column_names]
    if columns == [data.text]:
        texts = read_each(rows[data.text][:], lambda value: text_of(value, str(data.text)), where)
    else:

        def joined(values: tuple[object, ...]) -> str:
            parts = [
                text_of(value, name)
                for name, value in zip(columns, values, strict=True)
                if value is not None or name == data.text
            ]
            return "\n".join(part for part in parts if part.strip())

        texts = read_each(zip(*(rows[name][:] for name in columns), strict=True), joined, where)
    blank = [row for row, text in enumerate(texts) if not text.strip()] if filled else []
    if blank:
        raise RowError(blank, where, f"has an empty text in column {data.text!r}")
    return texts


def laid_out(rows: Dataset, data: DataConfig, where: str, *, filled: bool = False) -> list[Laid]:
    """Each row by `data.template`; where rows hold one text alone and the template wants more, as that text.

    Args:
        rows: the rows.
        data: the template, and the columns.
        where: name of the rows in errors.
        filled: refuse rows that lack a column.

    Raises:
        ConfigError: a column is missing.
        RowError: the template refuses rows, or makes nothing of them.
    """
    template, text = template_of(str(data.template), data.label), str(data.text)
    wanted = [name for name in template.columns if name != data.label]
    there = [name for name in template.columns if name in rows.column_names]
    if rows.column_names == [text] and wanted != [text] and not filled:
        return [Laid(each) for each in read_each(rows[text], partial(text_of, column=text), where)]
    for name in template.columns if template.strict and filled else wanted if template.strict else []:
        needs_column(rows, name, where)

    def lay(row: dict[str, Any]) -> Laid:
        if data.label in template.columns and data.label not in there:
            row = {**row, str(data.label): _UNKNOWN}  # a prompt to answer has no label yet
        laid = template.lay_out(row)
        if not laid.text.strip():
            raise Unusable("is laid out by data.template as nothing")
        return laid

    found = read_each(rows.select_columns(there), lay, where)
    return [Laid(laid.text.partition(_UNKNOWN)[0]) if _UNKNOWN in laid.text else laid for laid in found]


def filled_text(value: object, column: str) -> str:
    """A text that is to be written.

    Raises:
        Unusable: it is none, or empty.
    """
    if not text_of(value, column).strip():
        raise Unusable(f"has nothing to learn: the text in column {column!r} is empty")
    return str(value)


def joined_texts(rows: Dataset, data: DataConfig, where: str) -> list[str]:
    """Running texts, each of the rows that continue from one another, as ``data.continues`` says.

    Raises:
        ConfigError: a column is missing.
        RowError: rows have no text, or say neither.
    """
    text, goes = str(data.text), str(data.continues)
    needs_column(rows, goes, where)
    pieces = read_each(rows[text], partial(text_of, column=text), where)
    found: list[list[str]] = []
    for piece, goes_on in zip(pieces, rows[goes], strict=True):
        if goes_on and found:
            found[-1].append(piece)
        else:
            found.append([piece])
    return ["".join(parts) for parts in found]
