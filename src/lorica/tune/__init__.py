"""Search: many adapters trained at once over one frozen base, and Ray Tune above it.

Names are imported when first used, as in `lorica.train`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorica import names_of
from lorica.errors import require

require("greenlet", extra="tune")

if TYPE_CHECKING:
    from lorica.tune.journal import Evaluation as Evaluation
    from lorica.tune.journal import Record as Record
    from lorica.tune.population import Population as Population
    from lorica.tune.ramping import Ramp as Ramp
    from lorica.tune.ramping import ramp as ramp
    from lorica.tune.schedulers import Goal as Goal
    from lorica.tune.schedulers import Halving as Halving
    from lorica.tune.schedulers import Median as Median
    from lorica.tune.schedulers import RunAll as RunAll
    from lorica.tune.schedulers import Scheduler as Scheduler
    from lorica.tune.searching import SearchResult as SearchResult
    from lorica.tune.searching import search as search
    from lorica.tune.settings import RampConfig as RampConfig
    from lorica.tune.settings import SearchConfig as SearchConfig
    from lorica.tune.settings import reopen as reopen
    from lorica.tune.space import Dimension as Dimension
    from lorica.tune.space import Space as Space

__all__ = [
    "Dimension",
    "Evaluation",
    "Goal",
    "Halving",
    "Median",
    "Population",
    "Ramp",
    "RampConfig",
    "Record",
    "RunAll",
    "Scheduler",
    "SearchConfig",
    "SearchResult",
    "Space",
    "ramp",
    "reopen",
    "search",
]

__getattr__ = names_of(
    __name__,
    {
        "schedulers": "Goal Halving Median RunAll Scheduler",
        "journal": "Evaluation Record",
        "population": "Population",
        "ramping": "Ramp ramp",
        "searching": "SearchResult search",
        "settings": "RampConfig SearchConfig reopen",
        "space": "Dimension Space",
    },
)
