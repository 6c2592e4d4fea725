"""A report as a folder: its page, its numbers, and its figures in the paper's layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorica.checkpoint.atomic import Writer, replace_files
from lorica.errors import require
from lorica.plain import as_json
from lorica.study.page import chosen, page, similarity_title
from lorica.study.report import Report
from lorica.study.subspaces import random_phi

_WIDE = 4  # panels in a row
_NAMES = 48  # along a side of a map


def write_report(report: Report, out: str | Path) -> Path:
    """Write a report: a self-contained `index.html`, `study.json`, and each figure as PNG and SVG.

    Args:
        report: `gather`'s result.
        out: folder, created if missing.

    Returns:
        Path of the page.

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


def drawn(report: Report) -> dict[str, Writer]:
    """File name → function that writes it: each figure as PNG and SVG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", extra="study")
    figures: dict[str, Callable[[], Any]] = {"spectra": lambda: _spectra(report)}
    if report.similarity:
        figures["similarity"] = lambda: _similarity(report)
    if report.correlation:
        figures["layers"] = lambda: layers_among_themselves(report)
    if report.amplification:
        figures["amplification"] = lambda: _table_7(report)
    if report.overlap:
        figures["overlap"] = lambda: _overlap(report)
    return {
        f"{name}.{suffix}": lambda path, draw=draw: save_figure(draw, path)
        for name, draw in figures.items()
        for suffix in ("png", "svg")
    }


def save_figure(draw: Callable[[], Any], path: Path) -> None:
    """Draw a figure and write it; equal figures give equal files."""
    figure = draw()
    # No date, and names derived from the content, so that equal reports give equal files.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "lorica"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def sheet(count: int, title: str) -> tuple[Any, list[Any]]:
    """A figure outside matplotlib's global state and any display."""
    from matplotlib.figure import Figure

    columns = min(count, _WIDE)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(3 * columns, 5), 2.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure, axes[:count]


def _title(report: Report, path: str) -> str:
    spot = report.spots[path]
    return path if spot.layer is None else f"{spot.projection}, layer {spot.layer}"


def _short(report: Report, path: str) -> str:
    spot = report.spots[path]
    return path if spot.layer is None else f"{spot.layer} {spot.projection}"


def _spectra(report: Report) -> Any:
    names = list(dict.fromkeys(report.spots[path].projection for path in report.spectrum.layers))
    figure, axes = sheet(
        len(names), f"Singular values of ΔW in {report.name}; darker lines are earlier blocks"
    )
    for axis, name in zip(axes, names, strict=True):
        axis.sharey(axes[0])  # one scale for all, so that they can be compared
        found = [(p, s) for p, s in report.spectrum.layers.items() if report.spots[p].projection == name]
        for i, (_, s) in enumerate(found):
            shade = 0.15 + 0.7 * i / max(len(found) - 1, 1)
            if s.norm:
                axis.semilogy(range(1, len(s.values) + 1), s.values, color=str(shade), marker=".")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("singular direction, the strongest first", fontsize=8)
        axis.set_ylabel("singular value", fontsize=8)
    return figure


def _heat(figure: Any, axes: list[Any], panels: list[tuple[str, Any, str, str]]) -> None:
    image = None
    for axis, (title, phi, one, other) in zip(axes, panels, strict=True):
        rows, columns = phi.shape
        sides = (0.5, columns + 0.5, rows + 0.5, 0.5)  # directions are counted from 1
        image = axis.imshow(
            phi.tolist(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=sides
        )
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(other, fontsize=8)
        axis.set_ylabel(one, fontsize=8)
        axis.tick_params(labelsize=6)
    figure.colorbar(image, ax=axes, shrink=0.8, label="φ")


def _similarity(report: Report) -> Any:
    found = report.similarity
    assert found is not None
    paths = chosen(report, list(found.layers))
    sides = (f"first i of {report.name}", f"first j of {report.against}")
    panels = [(_title(report, p), found.layers[p].phi, *sides) for p in paths]
    one = found.layers[paths[0]]
    panels.append(("two random subspaces", random_phi(one.d, *one.phi.shape), "i", "j"))
    figure, axes = sheet(len(panels), similarity_title(report))
    _heat(figure, axes, panels)
    return figure


def layers_among_themselves(report: Report) -> Any:
    """The similarity of every two layers, named at their rows and columns."""
    found = report.correlation
    assert found is not None
    title = f"What the first {found.rank} directions of each ΔW read, each layer with each (appendix H.1)"
    figure, (axis,) = sheet(1, title)
    _heat(figure, [axis], [("", found.phi, "layer", "layer")])
    step = -(-len(found.paths) // _NAMES)
    places = range(1, len(found.paths) + 1, step)
    names = [_short(report, found.paths[i - 1]) for i in places]
    axis.set_yticks(places, names, fontsize=5)
    axis.set_xticks(places, names, fontsize=5, rotation=90)
    figure.set_size_inches(6.5, 5.5)
    return figure


def _table_7(report: Report) -> Any:
    """The paper's table, a row per layer; it shows two ranks of one layer side by side."""
    from matplotlib.figure import Figure

    paths = chosen(report, list(report.amplification))
    rows = [(_title(report, path), report.amplification[path]) for path in paths]
    columns = ["layer", "r", "ΔW", "W", "random", "‖ΔW‖", "‖W‖", "‖ΔW‖ / ‖UᵀWVᵀ‖"]
    cells = [
        [name, str(a.r)]
        + [f"{x:.3g}" for x in (a.in_update, a.in_weight, a.in_random, a.norm, a.weight_norm, a.factor)]
        for name, a in rows
    ]
    figure = Figure(figsize=(9, 0.26 * len(rows) + 0.9), layout="constrained")
    axis = figure.subplots()
    axis.axis("off")
    widths = [0.26, 0.06, *[0.11] * 5, 0.17]
    table = axis.table(cells, colLabels=columns, colWidths=widths, loc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    figure.suptitle("‖UᵀWVᵀ‖ with U and V of ΔW, of W itself and drawn at random (table 7)", fontsize=10)
    return figure


def _overlap(report: Report) -> Any:
    paths = chosen(report, list(report.overlap))
    panels = [(_title(report, p), report.overlap[p].phi, "i of W", "j of ΔW") for p in paths]
    panels.append(("random", report.overlap[paths[0]].random, "i of W", "j, random"))
    figure, axes = sheet(len(panels), "Directions of ΔW among W's strongest (figure 8)")
    _heat(figure, axes, panels)
    return figure
