"""The command line: ``lorica COMMAND ...``. A command's module is imported when the command is called."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from lorica.errors import LoricaError, nearest
from lorica.plain import Visible, visible

TRAINING = {
    "demo": "adapt a real model to a real task, beside full fine-tuning; no download, a few minutes",
    "init": "five questions, and a recipe with comments",
    "data": "what a recipe would learn from: lengths, cuts, duplicates, rows as the model sees them",
    "train": "train an adapter from a recipe, a file of rows or a Hub data set",
    "plan": "what training will cost: parameters, file, memory, arithmetic, the largest batch that fits",
    "tune": "search for the best rank, targets, learning rate, ... of a recipe",
    "compare": "methods × tasks × seeds from one file, to the LoRA paper's table and plot",
    "evaluate": "score a trained adapter",
    "predict": "use a trained adapter on a text or a file of them",
    "generate": "write texts with a trained model, an adapter, or any model",
}
ADAPTERS = {
    "info": "what is in an adapter: rank, targets, size, norm of each layer's update",
    "study": "what an adapter learned: a report with figures and advice on its ranks",
    "merge": "fold an adapter into its base: a plain checkpoint, as fast as the base",
    "combine": "several adapters into one: their weighted sum, TIES, DARE and others",
    "compress": "an adapter at the rank it needs, with the error that makes",
    "convert": "a checkpoint of loralib's to an adapter in PEFT's format, or back",
    "check-serve": "what vLLM, SGLang or llama.cpp would refuse of an adapter, and the remedy",
    "export": "an adapter for vLLM, SGLang, llama.cpp (GGUF) or MLX",
    "push": "upload an adapter's files to the Hugging Face Hub",
}
SERVING = {
    "serve": "answer requests over HTTP: one base, hundreds of adapters, OpenAI's endpoints, a page",
    "chat": "talk to a model and its adapters in the terminal, to two of them at once if you like",
}
ROOMS = {"training": TRAINING, "adapters": ADAPTERS, "serving": SERVING}
COMMANDS = {**TRAINING, **ADAPTERS, **SERVING}
"""Command → what it does; each is a module of a room."""

# What these log as they are imported is about kernels of theirs that no command needs.
_TALKATIVE = ("bitsandbytes", "torch.utils._pytree", "torchao")

SEVERAL = ("train", "evaluate", "predict")
"""Commands that several processes run together."""

CUT_OFF = 141  # as a shell reports a process whose reader left
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        0 on success, 1 after an error, 2 for wrong usage, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lorica {importlib.import_module('lorica').__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"lorica: there is no command {name!r}{nearest(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    if name not in SEVERAL and os.environ.get("WORLD_SIZE", "1") != "1":
        _complain(
            f"lorica {name} runs in one process, and a launcher has started {os.environ['WORLD_SIZE']} "
            "(WORLD_SIZE); start it without torchrun"
            f"{', and give it --launch.processes for each trial' if name == 'tune' else ''}"
        )
        return 1
    for library in () if debug else _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with _harmless():
            room = next(room for room, commands in ROOMS.items() if name in commands)
            module = importlib.import_module(f"lorica.cli.{room}.{name.replace('-', '_')}")
            return module.run(rest)
    except SystemExit as stop:  # the parser's: 0 after --help, 2 for wrong usage
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # whoever read the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_OFF
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except LoricaError as error:
        if debug:
            raise
        if type(error).__name__ != "OnAnother":  # which tells it
            _complain(str(error))
        return 1


def usage() -> str:
    """The text of ``lorica --help``."""
    return "\n".join(
        [
            "usage: lorica [--version] [--debug] COMMAND [...]",
            "",
            "Adapt a large model to a task by training two thin matrices beside each frozen weight.",
            "",
            "train, and use what was trained:",
            *(f"  {name:<11} {what}" for name, what in TRAINING.items()),
            "",
            "the files of adapters:",
            *(f"  {name:<11} {what}" for name, what in ADAPTERS.items()),
            "",
            "answer requests:",
            *(f"  {name:<11} {what}" for name, what in SERVING.items()),
            "",
            "`lorica COMMAND --help` shows a command's options with their units and defaults.",
            "--debug shows where an error came from.",
        ]
    )


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """Names out of files are in what commands print and warn of: none of them steers the terminal."""
    printed: Any = Visible(sys.stdout)
    before = warnings.formatwarning
    warnings.formatwarning = lambda *given, **named: visible(before(*given, **named))
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        warnings.formatwarning = before


def _complain(message: str) -> None:
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error: {visible(message)}{plain}", file=sys.stderr)
