"""The parser that all commands share: short errors, with the nearest option."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import jsonargparse

from lorica.errors import nearest

_UNKNOWN = re.compile(r"(?:[Uu]nrecognized arguments: |Option '?)(?P<flag>-*)(?P<name>[^\s'=]+)")
_RENAMED = {"out": "output", "alpha": "method.lora_alpha", "targets": "method.target_modules"}
"""What an option was called before → what it is called now."""


def add_output(parser: Parser, text: str, default: str | None = None) -> None:
    """Give a command the option that says where it writes.

    Args:
        parser: of the command.
        text: what is written, and what holds where nothing is given.
        default: where to, if nothing is given; None: `output_of` asks for it, or nothing is written.
    """
    parser.add_argument("-o", "--output", type=str if default else str | None, default=default, help=text)


def output_of(parser: Parser, parsed: Any) -> str:
    """Where to write; a command that must know stops if it is not told."""
    if parsed.output is None:
        parser.error("name what to write with --output (not by a last word)")
    return parsed.output


def add_trust(parser: Parser) -> None:
    """Give a command that uses a recipe's task the option to run one that is code."""
    parser.add_argument(
        "--trust_task",
        action="store_true",
        help="use the file's or folder's task also where it is Python code (file.py:Class), which runs then",
    )


class Parser(jsonargparse.ArgumentParser):
    """A parser that answers wrong usage in three lines, not with every option there is."""

    def __init__(self, command: str = "", **options: Any) -> None:
        """Make the parser of one command; without one, jsonargparse makes one for a part of the options."""
        if command:
            options = {"prog": f"lorica {command}", "allow_abbrev": False, **options}
        super().__init__(**options)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help may be coloured; it holds no names out of files."""
        super()._print_message(message, getattr(file, "stream", file))

    def parse_args(self, *given: Any, **named: Any) -> Any:
        """As jsonargparse's; a number that no float holds is wrong usage too."""
        try:
            return super().parse_args(*given, **named)
        except OverflowError as error:
            self.error(str(error))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and stop with status 2."""
        unknown = _UNKNOWN.search(message)
        if unknown:
            known = [flag.lstrip("-") for action in self._actions for flag in action.option_strings]
            message = _unknown(unknown["flag"], unknown["name"], known)
        print(f"{self.prog}: {message.strip()}\nsee: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _unknown(flag: str, name: str, known: list[str]) -> str:
    """What to say of a word that a command does not take."""
    if not flag:
        written = "; what it writes is named by --output" if "output" in known else ""
        return f"{name!r} is one word too many{written}"
    plain = name.replace("-", "_")
    same = [option for option in known if option.rpartition(".")[2] == plain and option != plain]
    new = _RENAMED.get(plain) if _RENAMED.get(plain) in known else same[0] if len(same) == 1 else None
    if new is not None:
        return f"there is no option {flag}{name}: it is --{new}"
    return f"there is no option {flag}{name}{nearest(name, known)}"
