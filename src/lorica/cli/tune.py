"""``lorica tune``: a search around a recipe."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from lorica.cli import INTERRUPTED
from lorica.cli.parsing import Parser
from lorica.errors import ConfigError


def parser() -> Parser:
    """The command's options."""
    from lorica.tune import RampConfig, SearchConfig

    result = Parser(
        "tune",
        usage="lorica tune [RECIPE.yaml] [--space SPACE.yaml] [--trials N] [--algorithm random|tpe|grid] ... "
        "[--out DIR]\n       lorica tune --resume DIR\n       lorica tune [RECIPE.yaml] --ramp [--out DIR]",
        description="Search for the best values of a recipe's fields. Trials that differ only in what can be "
        "joint are trained together over one base; others run in processes of Ray Tune.",
    )
    add = result.add_argument
    add(
        "recipe",
        type=str | None,
        nargs="?",
        help="recipe that the trials have in common; its defaults if left out",
    )
    add(
        "--space",
        type=str | None,
        help="YAML file of the fields to search (default: what LoRA's tutorials search)",
    )
    add("--out", type=str, default="runs/tune", help="folder to write (default: runs/tune)")
    add("--resume", type=str | None, help="go on with the search that this folder holds")
    add("--ramp", action="store_true", help="look for the rank that is enough: double it while that helps")
    result.add_class_arguments(SearchConfig)
    result.add_class_arguments(RampConfig, nested_key="rank")
    return result


def run(argv: list[str]) -> int:
    """Search, and show what came of it."""
    from lorica.train.console import make_console
    from lorica.train.recipe import Recipe
    from lorica.tune import SearchConfig, Space, ramp, reopen, search

    command = parser()
    parsed: Any = command.parse_args(argv)
    console = make_console()
    if parsed.resume is not None and (parsed.recipe is not None or parsed.space is not None):
        raise ConfigError("--resume takes the recipe and the space from the folder; leave them out")
    if parsed.ramp:
        values = command.instantiate(parsed)
        recipe = Recipe.load(parsed.recipe) if parsed.recipe is not None else Recipe()
        advised = ramp(recipe, parsed.out, values.rank, console=console)
        console.print(str(advised), soft_wrap=True)
        return 0
    if parsed.resume is not None:
        recipe, space, config = reopen(parsed.resume)
        out = parsed.resume
    else:
        recipe = Recipe.load(parsed.recipe) if parsed.recipe is not None else Recipe()
        space = Space.load(parsed.space) if parsed.space is not None else None
        values = command.instantiate(parsed)
        config = SearchConfig(**{item.name: values[item.name] for item in dataclasses.fields(SearchConfig)})
        out = parsed.out
    try:
        result = search(recipe, space, out, config, resume=parsed.resume is not None, console=console)
    except KeyboardInterrupt:
        print(f"interrupted; resume with: lorica tune --resume {shlex.quote(str(out))}", file=sys.stderr)
        return INTERRUPTED
    if result.folder is None:
        return 1
    assert result.best is not None
    folder = shlex.quote(str(result.folder))
    console.print(f"best: trial {result.best.name}; its own adapter and recipe are in {folder}")
    console.print(
        f"next: lorica evaluate {folder}   lorica train {shlex.quote(str(Path(folder) / 'recipe.yaml'))}"
    )
    return 0
