"""The options that commands which write text share: how, and what it is scored by."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorica.cli.parsing import Parser
from lorica.train.generation.config import GenerationConfig

_PREFIX = "generation."


def add_generation(parser: Parser) -> None:
    """Give a parser the fields of a recipe's ``generation``, each left out unless it is given."""
    group = parser.add_argument_group("how text is written (default: as the recipe says)")
    types = {"metrics": list[str], "arguments": dict[str, Any], "eval_rows": int}
    for item in dataclasses.fields(GenerationConfig):
        kind = types.get(item.name) or {"int": int, "float": float, "bool": bool}[str(item.type)]
        group.add_argument(f"--{_PREFIX}{item.name}", type=kind | None)


def generation_of(parsed: Any, recipe: GenerationConfig) -> GenerationConfig:
    """A recipe's settings with those that were given in their place."""
    given = {item.name: parsed.get(_PREFIX + item.name) for item in dataclasses.fields(GenerationConfig)}
    return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})
