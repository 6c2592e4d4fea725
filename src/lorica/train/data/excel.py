"""Workbooks of Excel: a sheet's rows, every cell as the text that it shows."""

from __future__ import annotations

import datetime
import io
import re
from pathlib import Path
from typing import Any

from lorica.errors import FileError
from lorica.train.data.delimited import Row, as_table
from lorica.train.data.tables import Form, Found


def read_sheets(raw: bytes, path: Path, form: Form) -> dict[str | None, Found]:
    """Rows of a workbook's sheets, by their names; under None where only one has any.

    Raises:
        FileError: it cannot be read, openpyxl is not installed, or no sheet has rows.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise FileError(
            f"{path} needs openpyxl, which is not installed: pip install 'lorica[excel]'. Or save it as csv"
        ) from error
    try:
        book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
        rows = {sheet.title: _rows(sheet) for sheet in book.worksheets}
    except Exception as error:  # zipfile's, the XML parser's and openpyxl's own kinds
        raise FileError(f"cannot read {path} as xlsx: {type(error).__name__}: {error}") from error
    filled = {title: found for title, found in rows.items() if len(found) > 1 or (found and form.columns)}
    if not filled:
        raise FileError(f"{path} has no rows")
    alone = len(filled) == 1
    return {
        None if alone else title: as_table(
            found, path, form, notes=[f"its sheet {title!r} is read"] * (len(rows) > 1)
        )
        for title, found in filled.items()
    }


def _rows(sheet: Any) -> list[Row]:
    found = [
        Row(number, [_shown(cell) for cell in cells]) for number, cells in enumerate(sheet.iter_rows(), 1)
    ]
    width = max((place + 1 for row in found for place, cell in enumerate(row.cells) if cell), default=0)
    return [Row(row.line, row.cells[:width]) for row in found if any(row.cells)]


def _shown(cell: Any) -> str:
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, (int, float)):
        return _number(value, str(cell.number_format))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return value.isoformat(" ") if isinstance(value, datetime.datetime) else str(value)


def _number(value: float, shown_as: str) -> str:
    if isinstance(value, int) or value.is_integer():
        whole = str(int(value))
        if re.fullmatch("0+", shown_as):
            return whole.zfill(len(shown_as))
        value = int(value)
    if decimals := re.fullmatch(r"[#,]*0\.(0+)", shown_as):
        return f"{value:.{len(decimals[1])}f}"
    return str(value)
