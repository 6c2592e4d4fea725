"""The paper's comparison: methods × tasks × seeds from one file, to one table; and the demonstration.

Names are imported on first use, as in `lorica.train`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorica import names_of

if TYPE_CHECKING:
    from lorica.compare.file import Comparison as Comparison
    from lorica.compare.file import FewShot as FewShot
    from lorica.compare.loop import compare as compare
    from lorica.compare.loop import gather as gather
    from lorica.compare.report import write_table as write_table
    from lorica.compare.table import Table as Table

__all__ = ["Comparison", "FewShot", "Table", "compare", "gather", "write_table"]

__getattr__ = names_of(
    __name__,
    {
        "file": "Comparison FewShot",
        "table": "Table",
        "loop": "compare gather",
        "report": "write_table",
    },
)
