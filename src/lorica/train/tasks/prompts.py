"""What a prompt is made of: the columns of its parts, and the text that they make together."""

from __future__ import annotations

from datasets import Dataset

from lorica.train.data.columns import needs_column, text_of
from lorica.train.data.rows import RowError, Unusable, read_each
from lorica.train.settings import DataConfig


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
