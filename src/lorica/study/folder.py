"""A report as a folder: a page, figures and numbers."""

from __future__ import annotations

from pathlib import Path

from lorica.checkpoint.atomic import Writer, replace_files
from lorica.plain import as_json
from lorica.study.figures import drawn
from lorica.study.page import page
from lorica.study.report import Report


def write_report(report: Report, out: str | Path) -> Path:
    """Write a report: `index.html`, which needs nothing else, `study.json`, and each figure as PNG and SVG.

    Args:
        report: what `gather` returned.
        out: folder, made if it is not there.

    Returns:
        The page.

    Raises:
        FileError: the folder cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    data = as_json(report.to_dict(), indent=1)
    writers: dict[str, Writer] = {**drawn(report)}
    writers["study.json"] = lambda path: _text(path, data + "\n")
    writers["index.html"] = lambda path: _text(path, page(report))
    replace_files(Path(out), writers)
    return Path(out) / "index.html"


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
