"""``lorica train``: a recipe, trained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from lorica.cli import INTERRUPTED
from lorica.cli.shared import hints
from lorica.cli.shared.parsing import Parser, add_launch, add_trust, expanded, launched, print_help, tells
from lorica.errors import require
from lorica.train.recipe import Recipe, add_recipe, check_file, check_trusted, from_parsed


def parser() -> Parser:
    """The command's options: every field of a recipe."""
    result = Parser(
        "train",
        usage="lorica train [RECIPE.yaml | --from run.json] [-t TASK] [-m MODEL] [-d ROWS] [--method.r R] "
        "[--lr RATE] ... [-o DIR]",
        description="Train an adapter. RECIPE.yaml holds any of the options below; those given here "
        "override it.",
    )
    add_recipe(result)
    result.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint in --output"
    )
    result.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    result.add_argument(
        "--from",
        type=str | None,
        help="repeat a run from the run.json that it left, on a CPU bit for bit; give it another --output",
    )
    result.add_argument(
        "--changed_data", action="store_true", help="with --from: go on though the rows have changed"
    )
    result.add_argument(
        "--changed_processes",
        action="store_true",
        help="with --resume: go on in another number of processes than the run had; training.batch_size must "
        "make as many rows a step",
    )
    add_launch(result)
    add_trust(result)
    return result


def run(argv: list[str]) -> int:
    """Train, and show the scores."""
    if {"-h", "--help"} & {*argv}:
        print_help(parser(), "train")
        return 0
    argv = ["--help" if argument == "--help-all" else argument for argument in expanded(argv)]
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    for path in _given(argv, "--config"):
        check_file(path)
    command = parser()
    parsed: Any = command.parse_args(argv)
    path = parsed["from"]
    if parsed.changed_data and path is None:
        command.error("--changed_data belongs to --from")
    if parsed.changed_processes and not parsed.resume:
        command.error("--changed_processes belongs to --resume")
    hint = "go on from the last checkpoint with the same command and --resume"
    if (code := launched(command, parsed, "train", argv, hint)) is not None:
        return code

    from lorica.train.console import make_console, silent, waiting

    console = make_console() if tells() else silent()
    with waiting(console, "loading torch and transformers"):
        from lorica.train.distributed.group import joined, wait_for_all
        from lorica.train.record import Record
        from lorica.train.run import RECIPE, train
        from lorica.train.trainer.fit import Interrupted

    repeats = None if path is None else Record.load(path, trust_task=True)  # seen to below
    if repeats is not None:
        # The recorded recipe comes first, so that the options override it.
        recorded = json.dumps(dataclasses.asdict(repeats.recipe))
        parsed = command.parse_args(["--config", recorded, *argv])
    recipe = from_parsed(command, parsed)
    typed = {part for argument in argv for part in (argument, argument.partition("=")[2])}
    unseen = [code for code in recipe.code() if code not in typed]  # what was typed is the user's own
    check_trusted(unseen, "the recipe", trust_task=parsed.trust_task)
    cpu = bool(recipe.training.arguments.get("use_cpu"))
    launch = command.instantiate(parsed).launch
    work = functools.partial(train, engine=launch.engine)
    if launch.engine == "ray":
        require("ray.train", extra="ray")
        from lorica.train.ray import train_on_ray

        work = functools.partial(train_on_ray, config=launch)
    with joined(cpu=cpu, hint=f"{hint} (the run is in {recipe.output})"):
        try:
            result = work(
                recipe,
                resume=parsed.resume,
                overwrite=parsed.overwrite,
                console=console,
                repeats=repeats,
                changed_data=parsed.changed_data,
                changed_processes=parsed.changed_processes,
            )
        except Interrupted as stop:
            if tells():
                print(stop, file=sys.stderr)
                words = [*_several(launch), *hints.word(recipe)]
                again = hints.command("train", Path(recipe.output) / RECIPE, "--resume", *words)
                print(f"resume with: {again}", file=sys.stderr)
            wait_for_all()  # a launcher that sees the first of them end ends the others
            return INTERRUPTED
        if tells():
            show(console, recipe, result)
        wait_for_all()
    return 0


def _several(launch: Any) -> list[str]:
    """The options that start as many processes as there are, on one machine or in Ray, by the same engine."""
    own = [] if launch.engine == "ddp" else ["--launch.engine", launch.engine]
    if launch.engine == "ray":
        address = [] if launch.address is None else ["--launch.address", launch.address]
        return ["--launch.processes", str(launch.processes), *own, *address]
    world, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return [*(["--launch.processes", here] if world == here != "1" else []), *own]


def _given(argv: list[str], flag: str) -> list[str]:
    """The value of an option, in either of its forms."""
    apart = [value for name, value in itertools.pairwise(argv) if name == flag]
    return [*apart, *(each.removeprefix(f"{flag}=") for each in argv if each.startswith(f"{flag}="))]


def show(console: Any, recipe: Recipe, result: Any) -> None:
    """Print the results of a run."""
    from lorica.train.console import duration, print_table, scores, size

    names = list(dict.fromkeys(name for metrics in result.metrics.values() for name in metrics))
    if names:
        every = [
            (title, f"{result.rows[split]:,}", metrics)
            for split in result.metrics
            for title, metrics in (
                (split, result.metrics[split]),
                (f"{split}, always the largest class", result.majority.get(split)),
            )
            if metrics is not None
        ]
        rows = [
            [title, count, *(dict(scores(metrics)).get(name, "") for name in names)]
            for title, count, metrics in every
        ]
        print_table(console, "scores", ["split", "rows", *names], rows)
    console.print(
        f"{result.steps:,} steps in {duration(result.seconds)}; {result.trainable:,} of "
        f"{result.parameters:,} parameters trained; "
        f"adapter of {size(result.checkpoint_bytes)} in {result.output}",
        markup=False,  # brackets in a path are none
        soft_wrap=True,
    )
    made = Recipe.load(result.output / "recipe.yaml", trust_task=True)  # by this very run
    hints.show(
        hints.to_evaluate(result.output, made, scored="test" in result.rows),
        hints.to_use(result.output, made),
        hints.to_merge(made.model, result.output, made),
    )
