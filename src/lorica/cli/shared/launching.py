"""A command in several processes: its own options, and itself in each of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lorica.cli.shared.parsing import Parser

_PREFIX = "--launch."
_ENGINE = f"{_PREFIX}engine"
"""What each of the processes has to know too."""


def tells() -> bool:
    """Whether this process is the one that prints: the first, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def add_launch(parser: Parser) -> None:
    """Give a command the options that start it in several processes."""
    from lorica.train.settings import LaunchConfig

    parser.add_class_arguments(LaunchConfig, "launch")


def launched(parser: Parser, parsed: Any, command: str, argv: Sequence[str], hint: str) -> int | None:
    """Run a command in as many processes as its options say; None says that this process runs it.

    Args:
        parser: the command's.
        parsed: its options.
        command: its name.
        argv: its arguments.
        hint: how to go on after a process was lost.

    Returns:
        The exit status of all of them.
    """
    config = parser.instantiate(parsed).launch
    if config.engine != "ddp" and command != "train":
        parser.error(
            f"{_ENGINE} {config.engine} is for `lorica train`; leave it out of `lorica {command}`, which "
            "holds the whole model in each of its own processes"
        )
    if config.processes is None:
        return None
    if "RANK" in os.environ:
        parser.error("a launcher such as torchrun has started this already; leave out --launch.processes")
    if config.engine == "ray":
        return None  # this process is not one of the workers, and waits for them
    from lorica.cli import main
    from lorica.train.distributed.launch import launch

    return launch(main, ([command, *_without(argv)],), config, hint)


def _without(argv: Sequence[str]) -> list[str]:
    """Arguments without those that say how to launch."""
    kept: list[str] = []
    skip = False
    for argument in argv:
        if skip:
            skip = False
        elif argument.startswith(_PREFIX) and argument.partition("=")[0] != _ENGINE:
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept
