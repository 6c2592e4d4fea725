"""Reading YAML files that others wrote: plain values come back, or one kind of error.

YAML can say one thing by many names, in few lines more of it than there is memory, and its parser needs time
that grows with the square of how deeply brackets are nested. Neither has a use in a recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lorica.errors import FileError
from lorica.reading import DEPTH, bearable

_MERGED = 10_000
"""Fields of a map after those that it takes over from others (``<<``)."""


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Take over other maps' fields, as many as somebody may have written by hand."""
        for key, value in node.value:
            merged = key.tag == "tag:yaml.org,2002:merge" and isinstance(value, yaml.SequenceNode)
            if merged and len(value.value) > DEPTH:
                raise yaml.YAMLError(f"a map takes over {len(value.value)} others")
        super().flatten_mapping(node)
        if len(node.value) > _MERGED:
            raise yaml.YAMLError(f"a map has more than {_MERGED:,} fields")


def read_yaml(path: Path, what: str) -> Any:
    """The value in a YAML file.

    Args:
        path: of the file.
        what: it is to hold, such as "the recipe".

    Raises:
        FileError: it cannot be read, is not YAML, or holds what nobody writes into such a file.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FileError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except ValueError as error:  # no UTF-8; or a path that no file can have
        raise FileError(f"{what} {path} is not YAML: {error}") from error
    try:
        if _deepest(text) > DEPTH:
            raise ValueError(f"its brackets are nested more than {DEPTH} deep")
        return bearable(yaml.load(text, _Loader))
    except RecursionError:
        reason = "it is nested too deeply"
    except (
        Exception
    ) as error:  # a date that is none, a number of a thousand digits: each fails in its own way
        reason = str(error) or type(error).__name__
    raise FileError(f"{what} {path} is not YAML: {reason}")


def _deepest(text: str) -> int:
    """How deep brackets stand inside one another, those in quotes and comments too, where few stand."""
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth = max(depth - 1, 0)
    return deepest
