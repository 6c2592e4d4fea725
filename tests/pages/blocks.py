"""A page's fenced blocks, and how each is run: as it is printed, in order, in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorica.cli import main

_FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<why>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    flags=re.DOTALL | re.MULTILINE,
)
RUN = ("python", "sh", "yaml")


class Block(NamedTuple):
    """A fenced block.

    Args:
        line: of the page, that it starts in.
        language: as the fence names it.
        text: what is in it.
        why: the reason that it is not run, or None.
    """

    line: int
    language: str
    text: str
    why: str | None


def blocks_of(page: str) -> Iterator[Block]:
    """A page's blocks in order."""
    for found in _FENCE.finditer(page):
        line = page.count("\n", 0, found.start("language")) + 1
        yield Block(line, found["language"], textwrap.dedent(found["text"]), found["why"])


def run(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run a block.

    Args:
        block: one that is to be run.
        page: where it comes from, for messages.
        names: what the page's Python has defined so far.
    """
    if name := file_of(block):
        Path(name).write_text(block.text, encoding="utf-8")
    if block.language == "python":
        # Behind empty lines, so that a traceback names the page's own line.
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    elif block.language == "sh" and not block.text.startswith("lorica"):
        subprocess.run(["bash", "-euc", block.text], check=True)
    elif block.language == "sh":
        for command in commands(block.text):
            assert main(command[1:]) == 0, f"{page.name}, line {block.line}: {shlex.join(command)}"


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of shell, all of which are lorica's."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "lorica", f"only lorica's commands can be run here, not {line!r}"
            yield words


def file_of(block: Block) -> str | None:
    """The name in a file's first line, ``# recipe.yaml`` or ``# space.yaml: what it is for``."""
    found = re.match(r"# ([\w./-]+\.(?:yaml|py))\b", block.text)
    return found[1] if found else None
