"""``lorica tune``: a search around a recipe."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from lorica.cli import INTERRUPTED
from lorica.cli.shared import hints
from lorica.cli.shared.parsing import Parser, add_output, add_trust
from lorica.errors import ConfigError, listing


def parser() -> Parser:
    """The command's options."""
    from lorica.tune import RampConfig, SearchConfig
    from lorica.tune.settings import FREE

    result = Parser(
        "tune",
        usage="lorica tune [RECIPE.yaml] [--space SPACE.yaml] [--trials N] [--algorithm random|tpe|grid] ... "
        "[-o DIR]\n"
        "       lorica tune [RECIPE.yaml] --launch.processes N [--launch.engine ddp|fsdp2|ray] ... [-o DIR]\n"
        "       lorica tune --resume DIR [--trials N] [--slots N] ...\n"
        "       lorica tune [RECIPE.yaml] --ramp [--rank.limit R] [--rank.gain GAIN] [-o DIR]",
        description="Search for the best values of a recipe's fields. Trials that differ only in what can be "
        "joint are trained together over one base; others run in processes of Ray Tune; with "
        "--launch.processes each trial has several.",
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
    add_output(result, "folder to write (default: runs/tune, or runs/ramp with --ramp)")
    add(
        "--resume",
        type=str | None,
        help="go on with the search that this folder holds; how much of it, and where, may be other than "
        f"before: {', '.join(f'--{name}' for name in FREE)}",
    )
    add("--ramp", action="store_true", help="look for the rank that is enough: double it while that helps")
    add_trust(result)
    result.add_class_arguments(SearchConfig)
    result.add_class_arguments(RampConfig, nested_key="rank")
    return result


def run(argv: list[str]) -> int:
    """Search, and show the result."""
    from lorica.train.recipe import Recipe
    from lorica.tune import SearchConfig, Space, reopen
    from lorica.tune.settings import FREE

    command = parser()
    parsed: Any = command.parse_args(argv)
    flat = vars(command.parse_args(argv, defaults=False).as_flat())
    given = {
        name if name.startswith("launch.") else name.partition(".")[0]
        for name, value in flat.items()
        if value is not None
    }
    _check_together(given, parsed)

    from lorica.train.console import make_console, waiting

    console = make_console()
    if parsed.resume is not None:
        recipe, space, before = reopen(parsed.resume, trust_task=parsed.trust_task)
        parsed["launch.processes"] = before.launch.processes
        if "launch.engine" not in given:
            parsed["launch.engine"] = before.launch.engine
        values = command.instantiate(parsed)
        free = {name for name in FREE if name in given and "." not in name}
        config = dataclasses.replace(before, launch=values.launch, **{name: values[name] for name in free})
        out = parsed.resume
    else:
        values = command.instantiate(parsed)
        config = SearchConfig(**{item.name: values[item.name] for item in dataclasses.fields(SearchConfig)})
        recipe = (
            Recipe.load(parsed.recipe, trust_task=parsed.trust_task)
            if parsed.recipe is not None
            else Recipe()
        )
        space = Space.load(parsed.space) if parsed.space is not None else None
        out = parsed.output or ("runs/ramp" if parsed.ramp else "runs/tune")
    with waiting(console, "loading torch and transformers"):
        from lorica.tune import ramp, search
    if parsed.ramp:
        curve = ramp(recipe, out, values.rank, console=console)
        console.print(str(curve), soft_wrap=True, markup=False)
        if curve.r is not None:
            alpha = f"{recipe.method.lora_alpha * curve.r / recipe.method.r:g}"
            which = [parsed.recipe] if parsed.recipe is not None else []
            ranks = ("--method.r", curve.r, "--method.lora_alpha", alpha)
            folder = hints.unused(f"{out}-best")
            hints.show(hints.command("train", *which, *ranks, "--output", folder, *hints.word(recipe)))
        return 0
    try:
        result = search(recipe, space, out, config, resume=parsed.resume is not None, console=console)
    except KeyboardInterrupt:
        print(f"interrupted; resume with: lorica tune --resume {shlex.quote(str(out))}", file=sys.stderr)
        return INTERRUPTED
    if result.folder is None:
        return 1
    assert result.best is not None
    folder = Path(result.folder)
    console.print(
        f"best: trial {result.best.name}; its own adapter and recipe are in {folder}",
        markup=False,
        soft_wrap=True,
    )
    made = Recipe.load(folder / "recipe.yaml", trust_task=True)  # as it was searched with
    again = hints.unused(f"{folder}-again")
    seed = ["--training.seed", made.training.seed + 1]
    if config.launch.processes is not None:
        seed += ["--launch.processes", config.launch.processes]
    hints.show(
        hints.to_evaluate(folder, made, scored=hints.has_test_rows(folder)),
        hints.to_use(folder, made),
        hints.command("train", folder / "recipe.yaml", *seed, "--output", again, *hints.word(made)),
    )
    return 0


def _check_together(given: set[str], parsed: Any) -> None:
    """Refuse options that would have no effect beside others."""
    from lorica.tune.settings import FREE

    if parsed.ramp:
        useless = given - {"recipe", "ramp", "rank", "output", "trust_task"}
        why = "--ramp takes --rank.* and --output alone; what decides is the recipe's metric_for_best"
    elif parsed.resume is not None:
        useless = given - {"resume", "trust_task", *FREE}
        why = "--resume takes the recipe, the space and the other options from the folder"
    else:
        useless, why = given & {"rank"}, "--rank.* are options of --ramp"
    if useless:
        named = listing(name if name == "recipe" else f"--{name}" for name in sorted(useless))
        raise ConfigError(f"{why}; leave out {named}")
