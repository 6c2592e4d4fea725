"""Many adapters trained at once over one frozen base.

Names are imported when first used, as in `lorica.train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorica.errors import require

require("greenlet", extra="tune")

if TYPE_CHECKING:
    from lorica.tune.halving import Halving as Halving
    from lorica.tune.halving import Median as Median
    from lorica.tune.halving import RunAll as RunAll
    from lorica.tune.halving import Scheduler as Scheduler
    from lorica.tune.journal import Evaluation as Evaluation
    from lorica.tune.journal import Record as Record
    from lorica.tune.population import Population as Population
    from lorica.tune.referee import Goal as Goal

_PLACES = {
    "halving": ("Halving", "Median", "RunAll", "Scheduler"),
    "journal": ("Evaluation", "Record"),
    "population": ("Population",),
    "referee": ("Goal",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "Evaluation",
    "Goal",
    "Halving",
    "Median",
    "Population",
    "Record",
    "RunAll",
    "Scheduler",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
