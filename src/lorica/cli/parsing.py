"""The parser that all commands share: short errors, with the nearest option."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import jsonargparse

from lorica.errors import nearest

_UNKNOWN = re.compile(r"(?:Unrecognized arguments: |Option '?|unrecognized arguments: )-*([\w.]+)")


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
            message = f"there is no option --{unknown[1]}{nearest(unknown[1], known)}"
        print(f"{self.prog}: {message.strip()}\nsee: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)
