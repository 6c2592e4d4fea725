"""Files of rows, a module for each kind: which reader takes a file, by its name.

    file's bytes → text.py (unpacked, decoded) → delimited.py | objects.py | lines.py | conll.py → rows
    workbook → sheets.py; parquet and arrow → datasets' own readers

Every cell of a text file stays the text that is written there: "01" and "1" are two labels, "1.10" is a text.
"""

from __future__ import annotations

from lorica.train.formats.found import Form, Found
from lorica.train.formats.reader import FORMATS, PACKED, format_of, read_file

__all__ = ["FORMATS", "PACKED", "Form", "Found", "format_of", "read_file"]
