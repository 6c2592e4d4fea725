"""What must not be written down: a run's files are shared, and a token in them is anybody's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Words of an argument's name, such as hub_token or WANDB_API_KEY.
_NAME = re.compile(
    r"(?:^|_)(?:token|tokens|password|passwd|secret|credentials?|api_?key|access_?key)$", re.IGNORECASE
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+:[^/\s@]+@")


def without_secrets(value: Any) -> Any:
    """Plain values as a file may hold them: without what is secret by its name, or by its form.

    Args:
        value: of maps, lists and plain values, such as a recipe's fields.
    """
    if isinstance(value, Mapping):
        return {name: without_secrets(item) for name, item in value.items() if not is_secret(name, item)}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return _IN_ADDRESS.sub("", _HUB_TOKEN.sub("", value)) if isinstance(value, str) else value


def is_secret(name: object, value: object) -> bool:
    """Whether a field's value, by its name, is one that opens somebody's account."""
    return isinstance(name, str) and isinstance(value, str) and _NAME.search(name) is not None
