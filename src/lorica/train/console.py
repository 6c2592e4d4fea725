"""Lines, tables and waiting lines on a console; the libraries below keep quiet."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import console as rich_console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lorica.plain import Visible, visible

_NOT_SHARES = frozenset({"loss", "perplexity", "nist", "cider", "mse", "mae", "margin", "kl", "length"})


class Console(rich_console.Console):
    """A console that shows names as they are: brackets are no markup, control characters steer nothing."""

    def __init__(self, **options: Any) -> None:
        """As rich's, of the same arguments."""
        shown = sys.stderr if options.get("stderr") else sys.stdout
        if "file" not in options and isinstance(shown, Visible):
            options["file"] = shown.stream  # the texts are seen to below, and colours are meant
        settings: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, **options}
        super().__init__(**settings)

    def render(
        self, renderable: rich_console.RenderableType, options: rich_console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """As rich's; the texts are made harmless, its own codes are not texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def make_console(*, stderr: bool = False) -> rich_console.Console:
    """A console; into a pipe it does not break lines."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=200, no_color=True)


def silent() -> rich_console.Console:
    """A console that shows nothing, for those processes of a run that are not the first."""
    return Console(file=io.StringIO(), quiet=True)


def print_table(
    console: rich_console.Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]
) -> None:
    """Print a table whose first column holds names and whose others hold numbers."""
    result = Table()
    for i, column in enumerate(columns):
        result.add_column(Text(column), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        result.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(result)


def scores(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Metrics as names and figures to show; shares as per cent."""
    return [
        (name, f"{value:.4f}" if name in _NOT_SHARES or name.startswith("reward") else f"{value:.2%}")
        for name, value in metrics.items()
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


EVERY = 10.0
"""Seconds between lines, into a pipe."""


@contextlib.contextmanager
def waiting(console: rich_console.Console | None, what: str) -> Iterator[None]:
    """Print the current work at once, and again while it lasts.

    On a terminal the line shows the seconds; into a pipe there is a line now and another every ten seconds.

    Args:
        console: where to say it; None says nothing.
        what: is being done, such as "reading rows.csv".
    """
    if console is None:
        yield
        return
    if not console.is_terminal:
        console.print(what, markup=False, soft_wrap=True)
    began, done = time.monotonic(), threading.Event()
    status = console.status("") if console.is_terminal else None

    def say() -> None:
        while not done.wait(1.0 if status is not None else EVERY):
            line = f"{what} ({duration(time.monotonic() - began)})"
            if status is not None:
                status.update(line)
            else:
                console.print(line, markup=False, soft_wrap=True)

    # A thread, for what takes the time is a library's call that tells nothing.
    clock = threading.Thread(target=say, daemon=True)
    if status is not None:
        status.update(what)
        status.start()
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        if status is not None:
            status.stop()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, libraries print no bars and notes of their own."""
    import datasets
    import transformers

    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    data_bars = datasets.utils.is_progress_bar_enabled()
    others = {name: logging.getLogger(name) for name in ("accelerate", "bitsandbytes")}
    levels = {name: logger.level for name, logger in others.items()}
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in others.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Loaders pin memory where it helps; on a machine without a GPU torch remarks on it at every one.
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        log.set_verbosity(level)
        for name, logger in others.items():
            logger.setLevel(levels[name])
        if bars:
            log.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()
