"""The paper's comparison: methods × tasks × seeds from one file, to one table.

Names are imported when first used, as those of `lorica.train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorica.compare.file import Comparison as Comparison
    from lorica.compare.file import FewShot as FewShot
    from lorica.compare.loop import compare as compare
    from lorica.compare.loop import gather as gather
    from lorica.compare.report import write_table as write_table
    from lorica.compare.table import Table as Table

_PLACE_OF = {
    "Comparison": "file",
    "FewShot": "file",
    "Table": "table",
    "compare": "loop",
    "gather": "loop",
    "write_table": "report",
}

__all__ = ["Comparison", "FewShot", "Table", "compare", "gather", "write_table"]


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
