"""What a run shows: on a terminal a line that moves, into a pipe plain lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_NOT_SHARES = frozenset({"loss", "perplexity", "nist", "cider", "mse", "mae"})


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not break lines where nobody reads them on a screen."""
    options: dict[str, Any] = {"stderr": stderr, "highlight": False, "emoji": False}  # :x: in a path is none
    console = Console(**options)
    return console if console.is_terminal else Console(**options, width=200, no_color=True)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column holds names and whose others hold numbers."""
    result = Table()
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    console.print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
    console.print(result)


def scores(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Metrics as names and figures to show; shares as per cent."""
    return [
        (name, f"{value:.4f}" if name in _NOT_SHARES else f"{value:.2%}") for name, value in metrics.items()
    ]


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a whole figure."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
