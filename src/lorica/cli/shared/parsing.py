"""The parser that all commands share, with short errors; options that several have, and their help.

An option's own name is its place in the recipe, such as ``--training.learning_rate``; ``--lr`` is short.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jsonargparse

from lorica.errors import nearest

if TYPE_CHECKING:
    from lorica.train.settings import GenerationConfig

_UNKNOWN = re.compile(r"(?:[Uu]nrecognized arguments: |Option '?)(?P<flag>-*)(?P<name>[^\s'=]+)")
_WRONG_TYPE = re.compile(
    r"""Parser key "(?P<key>[^"]+)"(?P<item> element \d+)?:\s+"""
    r"""(?:Does not validate against any of the Union subtypes\s+Subtypes: \[(?P<kinds>.*?)\]\n"""
    r""".*\n\s*Given value: (?P<value>.*)"""
    r"""|Expected a (?P<kind><class '\w+'>)\. Got value: (?P<given>.*))""",
    re.DOTALL,
)
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list such as '[a, b]'",
    "dict": "a mapping such as '{a: 1}'",
    "NoneType": "null",
}
"""Type → what messages call its values."""
_DIGITS = 308
"""Digits of the largest float."""
_RENAMED = {"out": "output", "alpha": "method.lora_alpha", "targets": "method.target_modules"}
"""Earlier name of an option → its name now."""

SHORT: Mapping[str, tuple[str, ...]] = {
    "model": ("-m",),
    "task": ("-t",),
    "data.train": ("-d",),
    "data.validation": ("--validation",),
    "data.test": ("--test",),
    "data.preset": ("--preset",),
    "output": ("-o",),
    "method.r": (),
    "method.lora_alpha": (),
    "method.target_modules": (),
    "training.learning_rate": ("--lr",),
    "training.epochs": ("--epochs",),
    "training.max_steps": ("--max-steps",),
    "training.batch_size": ("-b", "--batch-size"),
    "training.max_length": ("--max-length",),
    "training.seed": ("--seed",),
    "post.rewards": ("--reward",),
}
"""Options that most people set → their short names, in the order of the help; a hyphen may be an underscore.

A list's short name adds an item to it. A method's fields have one spelling, PEFT's name behind ``--method.``.
"""

_LISTS = frozenset({"post.rewards"})
_LONG = {
    short.replace("_", "-"): f"--{name}{'+' * (name in _LISTS)}"
    for name, shorts in SHORT.items()
    for short in shorts
}
_GENERATION = "generation."
_LAUNCH = "--launch."
_ENGINE = f"{_LAUNCH}engine"
"""The option that each of the processes has to know too."""
_GROUPS = {
    "": "the run",
    "data": "rows",
    "method": "LoRA (PEFT's names)",
    "training": "training",
    "generation": "writing text",
    "post": "preferences and rewards (TRL)",
}


def add_output(parser: Parser, text: str, default: str | None = None, *, required: bool = False) -> None:
    """Give a command the option that says where it writes.

    Args:
        parser: of the command.
        text: the folder's content, and the default.
        default: where to, if nothing is given; None: `output_of` asks for it, or nothing is written.
        required: say that it must be given.
    """
    text += " (required)" * required
    parser.add_argument("-o", "--output", type=str if default else str | None, default=default, help=text)


def output_of(parser: Parser, parsed: Any) -> str:
    """The option of the output folder; a command that must know stops if it is not given."""
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
        print(f"{self.prog}: {_in_words(message.strip())}\nsee: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _in_words(message: str) -> str:
    """A message of jsonargparse about a value of the wrong type, in a sentence; others as they are."""
    told = _WRONG_TYPE.fullmatch(message)
    if told is None:
        return message
    kinds = re.findall(r"<class '(\w+)'>|(\w+)\[[^]]*\]", told["kinds"] or told["kind"])
    known = [_TYPES.get(plain or generic) for plain, generic in kinds]
    if not known or None in known:
        return message
    named = list(dict.fromkeys(kind for kind in known if kind))
    key, value = f"{told['key']}{told['item'] or ''}", told["value"] or told["given"]
    digits = value.strip("'\"").lstrip("-")
    if digits.isdigit() and len(digits) > _DIGITS:
        return f"{key} must be {' or '.join(named)}, and one of {len(digits)} digits is too large"
    return f"{key} must be {' or '.join(named)}, not {value!r}"


def _unknown(flag: str, name: str, known: list[str]) -> str:
    """The message about a word that a command does not take."""
    if not flag:
        written = "; what it writes is named by --output" if "output" in known else ""
        return f"{name!r} is one word too many{written}"
    plain = name.replace("-", "_")
    same = [option for option in known if option.rpartition(".")[2] == plain and option != plain]
    new = _RENAMED.get(plain) if _RENAMED.get(plain) in known else same[0] if len(same) == 1 else None
    if new is not None:
        return f"there is no option {flag}{name}: it is --{new}"
    close = nearest(name, known).replace(" '", " '--")
    return f"there is no option {flag}{name}{close}"


def expanded(argv: Sequence[str], more: Mapping[str, str] | None = None) -> list[str]:
    """Arguments with each short name replaced by its option's own.

    Args:
        argv: arguments as they were typed.
        more: further short names → options.
    """
    known = {**_LONG, **(more or {})}
    result = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        long = (
            known.get(flag if flag in known else "--" + flag[2:].replace("_", "-"))
            if flag[:1] == "-"
            else None
        )
        result.append(argument if long is None else long + equals + value)
    return result


def print_help(parser: Any, command: str) -> None:
    """Print the options that most people set, and the names of all others."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    print(f"usage: {parser.usage}\n")
    print(textwrap.fill(parser.description or "", width))
    print("\noptions that most people set, with their defaults:")
    for name, shorts in SHORT.items():
        _print_option([*shorts, f"--{name}"], actions[name], width)
    own = [action for dest, action in actions.items() if "." not in dest and dest not in SHORT]
    lone = [a for a in own if not any(dest.startswith(f"{a.dest}.") for dest in actions)]
    rest = {dest for dest in actions if "." in dest and dest not in SHORT and not dest.endswith(".help")}
    print(f"\nall others; `lorica {command} --help-all` says what each does:")
    names: dict[str, list[str]] = {
        "": [a.option_strings[0] for a in lone if a.dest not in ("help", "help_all")]
    }
    for dest in actions:
        if dest in rest:
            names.setdefault(dest.partition(".")[0], []).append(f"--{dest}")
    for group, flags in names.items():
        print(f"  {_GROUPS.get(group, group)}:")
        print(
            textwrap.fill(
                " ".join(flags),
                width,
                initial_indent="    ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
        )


def _print_option(flags: Iterable[str], action: Any, width: int) -> None:
    text = first_sentence(str(action.help or ""))
    default = action.default
    if default is not None:
        text += f" (default: {default})"
    head = "  " + ", ".join(flags)
    indent = " " * 44
    if len(head) > 42:
        print(head)
        print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent))
    else:
        print(textwrap.fill(text, width, initial_indent=head.ljust(44), subsequent_indent=indent))


def first_sentence(text: str) -> str:
    """The part of a description before its first full stop; a parser's insertions are left out."""
    text = " ".join(text.split()).partition(" (type:")[0].partition(" (default:")[0]
    return text.partition(". ")[0].partition("; ")[0].rstrip(".")


def add_generation(parser: Parser) -> None:
    """Give a parser the fields of a recipe's ``generation``, each left out unless it is given."""
    import docstring_parser

    from lorica.train.settings import GenerationConfig

    described = {
        p.arg_name: p.description for p in docstring_parser.parse(GenerationConfig.__doc__ or "").params
    }
    group = parser.add_argument_group("how text is written (default: as the recipe says)")
    types = {"metrics": list[str], "arguments": dict[str, Any], "eval_rows": int}
    for item in dataclasses.fields(GenerationConfig):
        kind = types.get(item.name) or {"int": int, "float": float, "bool": bool}[str(item.type)]
        text = " ".join((described.get(item.name) or "").split())
        plain = isinstance(item.default, (int, float, str))
        text += f" A recipe's own default is {item.default}." if plain else ""
        group.add_argument(f"--{_GENERATION}{item.name}", type=kind | None, help=text)


def generation_of(parsed: Any, recipe: GenerationConfig) -> GenerationConfig:
    """A recipe's settings with those that were given in their place."""
    given = {item.name: parsed.get(_GENERATION + item.name) for item in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})


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
        elif argument.startswith(_LAUNCH) and argument.partition("=")[0] != _ENGINE:
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept
