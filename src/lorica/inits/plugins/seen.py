"""The findings of data on a module, for the inits that look at some."""

from __future__ import annotations

from typing import Any, TypeVar

from lorica.config import LoraConfig
from lorica.errors import StateError
from lorica.find import Target

S = TypeVar("S")


def check_seen(
    seen: object, kind: type[S], directions: int, target: Target, config: LoraConfig, call: str
) -> S:
    """Check what data showed of a module.

    Args:
        seen: the result of `Init.look`, or None.
        kind: the expected type.
        directions: number of directions per unit of rank.
        target: the module.
        config: gives the rank.
        call: name of the function that looks at data for this init.

    Raises:
        StateError: there is no result, or one for another rank.
    """
    value, r = config.init_lora_weights, config.rank(target.path)
    if not isinstance(seen, kind):
        raise StateError(
            f"{target.path}: init_lora_weights={value!r} starts from what data shows of this layer; give "
            f"lorica.adapt some (data=...), or call {call}(model, config, ...) with this configuration "
            "before adapting"
        )
    singular: Any = seen
    have = len(singular.S) // directions
    if have != r:
        raise StateError(f"{target.path}: {call} was called for r={have}, and now r={r}; call it again")
    return seen
