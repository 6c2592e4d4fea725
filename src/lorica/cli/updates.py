"""What `lorica combine` and `lorica compress` share: where the result goes, and the table of its errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.errors import FileError, LoricaWarning

if TYPE_CHECKING:
    from lorica.adapter import Adapter
    from lorica.algebra import ErrorReport

SHOWN = 10


def check_new(out: str) -> Path:
    """The folder to write to.

    Raises:
        FileError: it is there, and not empty.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileError(f"{folder} is not empty; give a new folder")
    return folder


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Tell lorica's warnings in one line each, on standard error."""
    from lorica.train.console import make_console

    notes = make_console(stderr=True)
    with warnings.catch_warnings():
        warnings.simplefilter("always", LoricaWarning)
        warnings.showwarning = lambda message, *_args, **_kwargs: notes.print(f"warning: {message}")
        yield


def save_and_show(adapter: Adapter, report: ErrorReport, out: Path, compared_to: str, more: str = "") -> None:
    """Write the result, and print the error of its worst layers, and of all."""
    from lorica.checkpoint import write
    from lorica.train.console import make_console, print_table, size

    write(adapter, out)
    console = make_console()
    layers = sorted(report.layers.items(), key=lambda item: -item[1].error)
    rows = [
        [path, str(layer.rank), f"{layer.norm:.4g}", f"{layer.error:.2e}"] for path, layer in layers[:SHOWN]
    ]
    title = f"relative error of the update, to {compared_to}"
    print_table(console, title, ["layer", "rank", "norm", "error"], rows)
    if len(layers) > SHOWN:
        console.print(f"... and {len(layers) - SHOWN} more layers with less")
    path, worst = report.worst
    console.print(f"worst {worst:.2e} ({path}), mean {report.mean:.2e}{more}")
    ranks = [layer.rank for _, layer in layers]
    rank = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    console.print(f"wrote an adapter of rank {rank}, {size(adapter.nbytes)}, to {out}", soft_wrap=True)
