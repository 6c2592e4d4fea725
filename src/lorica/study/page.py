"""The report as one page that opens anywhere: figures and tables are drawn by its own script."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from torch import Tensor

from lorica.plain import as_json
from lorica.study.report import Report, spread
from lorica.study.subspaces import expected_phi, random_phi

_PANELS = 6  # layers of each projection that have a heat-map


def page(report: Report) -> str:
    """The page's text; everything is inside it."""
    template = resources.files("lorica.study").joinpath("page.html").read_text(encoding="utf-8")
    data = as_json(sections(report), indent=None).replace("<", r"\u003c")
    return template.replace("{{title}}", html.escape(report.name)).replace("{{data}}", data)


def sections(report: Report) -> list[dict[str, Any]]:
    """What the page shows, in order: texts, tables, lines and heat-maps."""
    return [
        *_advice(report),
        _ranks(report),
        _spectra(report),
        *_similarity(report),
        *_correlation(report),
        *_table_7(report),
        *_overlap(report),
        _layers(report),
    ]


def _label(report: Report, path: str) -> str:
    spot = report.spots[path]
    return path if spot.layer is None else f"{spot.layer} {spot.projection}"


def _advice(report: Report) -> list[dict[str, Any]]:
    texts = list(report.notes)
    if report.advice is None:
        return [{"kind": "text", "title": "Nothing learned", "lines": texts}]
    a = report.advice
    proposal = (
        f"r = {a.config.r}, with other ranks for {len(a.config.rank_pattern)} layers: {a.parameters:,} "
        f"parameters instead of {a.before:,}, with {a.kept:.2%} of the energy"
    )
    pattern = json.dumps(a.config.rank_pattern, indent=1)
    head = {"kind": "text", "title": "Advice", "lines": [proposal, *a.evidence, *texts], "code": pattern}
    rows = [
        [_label(report, path), found.r, found.used, found.needed, found.rank, found.kept]
        for path, found in a.layers.items()
    ]
    columns = ["layer", "rank", "effective", f"for {100 * a.energy:.6g}%", "proposed", "kept"]
    return [head, {"kind": "table", "title": "Ranks, layer by layer", "columns": columns, "rows": rows}]


def _ranks(report: Report) -> dict[str, Any]:
    grid, layers, names = _grid(report)
    values = [[grid.get((layer, name)) for layer in layers] for name in names]
    panel = {"title": "", "rows": names, "columns": [str(x) for x in layers], "values": values}
    text = "exp of the entropy of the energy's shares: 1 where one direction has all of it"
    return {"kind": "heat", "title": "Effective rank by layer", "text": text, "panels": [panel]}


def _grid(report: Report) -> tuple[dict[tuple[int | str, str], float], list[int | str], list[str]]:
    grid: dict[tuple[int | str, str], float] = {}
    for path, found in report.spectrum.layers.items():
        spot = report.spots[path]
        grid["-" if spot.layer is None else spot.layer, spot.projection] = found.effective_rank
    layers = list(dict.fromkeys(layer for layer, _ in grid))
    return grid, layers, list(dict.fromkeys(name for _, name in grid))


def _spectra(report: Report) -> dict[str, Any]:
    panels: dict[str, list[dict[str, Any]]] = {}
    for path, found in report.spectrum.layers.items():
        line = {"name": _label(report, path), "values": found.values}
        panels.setdefault(report.spots[path].projection, []).append(line)
    text = "singular values of each layer's update, logarithmic; darker lines are earlier layers"
    shown = [{"title": name, "lines": lines} for name, lines in panels.items()]
    return {"kind": "lines", "title": "Spectra", "text": text, "panels": shown}


def chosen(report: Report, paths: list[str]) -> list[str]:
    """A few layers of each projection, from the first to the last."""
    names = dict.fromkeys(report.spots[path].projection for path in paths)
    return [
        path
        for name in names
        for path in spread([p for p in paths if report.spots[p].projection == name], _PANELS)
    ]


def _similarity(report: Report) -> list[dict[str, Any]]:
    found = report.similarity
    if found is None:
        return []
    paths = chosen(report, list(found.layers))
    panels = [_phi(_label(report, p), found.layers[p].phi, report.name, str(report.against)) for p in paths]
    one = found.layers[paths[0]]
    rows, columns = one.phi.shape
    level = expected_phi(one.d, rows, columns)
    panels.append(_phi("random", random_phi(one.d, rows, columns), "random", "random"))
    return [
        {
            "kind": "heat",
            "title": similarity_title(report),
            "text": f"φ(i, j) of the leading directions of A; by chance φ({rows}, {columns}) is {level:.4f}",
            "panels": panels,
            "max": 1,
        },
        {
            "kind": "table",
            "title": "Shared directions, layer by layer",
            "columns": ["layer", "φ(1, 1)", "φ of all", "by chance"],
            "rows": [
                [_label(report, p), s.at(1, 1), float(s.phi[-1, -1]), s.by_chance(*s.phi.shape)]
                for p, s in found.layers.items()
            ],
        },
    ]


def similarity_title(report: Report) -> str:
    """Which of the paper's figures the comparison is: of two ranks, or of two runs of one."""
    layers = report.similarity.layers.values() if report.similarity else ()
    same = all(s.phi.shape[0] == s.phi.shape[1] for s in layers)
    return f"Subspace similarity to {report.against} (figures {'4 and 7' if same else '3 and 6'})"


def _phi(title: str, phi: Tensor, one: str, other: str) -> dict[str, Any]:
    count = [[str(i + 1) for i in range(n)] for n in phi.shape]
    values = [[round(x, 4) for x in row] for row in phi.tolist()]
    return {"title": title, "rows": count[0], "columns": count[1], "values": values, "axes": [one, other]}


def _correlation(report: Report) -> list[dict[str, Any]]:
    found = report.correlation
    if found is None:
        return []
    names = [_label(report, path) for path in found.paths]
    # Each layer with itself is 1, beside which the others would all look alike.
    values = [
        [None if x != x or i == j else round(x, 4) for j, x in enumerate(row)]
        for i, row in enumerate(found.phi.tolist())
    ]
    panel = {"title": "", "rows": names, "columns": names, "values": values}
    text = f"φ({found.rank}, {found.rank}) of A's directions, each layer with each other (appendix H.1)"
    return [{"kind": "heat", "title": "Layers among themselves", "text": text, "panels": [panel]}]


def _table_7(report: Report) -> list[dict[str, Any]]:
    if not report.amplification:
        return []
    columns = ["layer", "r", "‖UᵀWVᵀ‖ of ΔW", "of W", "random", "by chance", "‖ΔW‖", "‖W‖", "factor"]
    rows = [
        [
            _label(report, p),
            a.r,
            a.in_update,
            a.in_weight,
            a.in_random,
            a.by_chance,
            a.norm,
            a.weight_norm,
            a.factor,
        ]
        for p, a in report.amplification.items()
    ]
    return [{"kind": "table", "title": "Amplification (table 7)", "columns": columns, "rows": rows}]


def _overlap(report: Report) -> list[dict[str, Any]]:
    paths = chosen(report, list(report.overlap))
    if not paths:
        return []
    panels = [_phi(_label(report, p), report.overlap[p].phi, "W", "ΔW") for p in paths]
    panels.append(_phi("random", report.overlap[paths[0]].random, "W", "random"))
    text = "φ(i, j) of W's strongest tenth of directions and those of ΔW, which read"
    return [{"kind": "heat", "title": "Overlap with W (figure 8)", "text": text, "panels": panels, "max": 1}]


def _layers(report: Report) -> dict[str, Any]:
    columns = ["layer", "‖A‖", "‖B‖", "‖ΔW‖", "stable rank", "shape"]
    if report.drift:
        columns += ["‖ΔW‖ / ‖W‖", "lost in bfloat16", "weights moved"]
    rows = []
    for path, n in report.norms.items():
        s = report.spectrum.layers.get(path)
        row: list[Any] = [_label(report, path), n.A, n.B, n.update, s.stable_rank if s else None]
        row.append(" x ".join(map(str, s.shape)) if s else "")
        if report.drift:
            d = report.drift.get(path)
            row += [n.relative, d.lost if d else None, d.moved if d else None]
        rows.append(row)
    return {"kind": "table", "title": "Sizes", "columns": columns, "rows": rows}
