"""The check behind the shapes in lorica's annotations; `conftest` has jaxtyping apply it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float, as in pyright


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the function's arguments and result whenever it is called."""
    try:
        return _checked(function)
    except BeartypeDecorHintPep673Exception:  # `Self` means nothing to it outside a decorated class
        return function
