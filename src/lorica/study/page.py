"""The report as one page that opens anywhere: figures and tables are drawn by its own script."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from torch import Tensor

from lorica.plain import as_json
from lorica.study.report import Report, spread
from lorica.study.subspaces import Similarity, expected_phi, random_phi

_PANELS = 6  # layers of each projection that have a heat map
_PHI = (
    "φ(i, j) is the share that the first i directions of one and the first j of the other have in common: 1 "
    "where the smaller span lies within the larger, 0 where they are orthogonal."
)


def page(report: Report) -> str:
    """The page's text; it refers to no other file."""
    template = resources.files("lorica.study").joinpath("page.html").read_text(encoding="utf-8")
    data = as_json({"facts": facts(report), "sections": sections(report)}, indent=None)
    title = html.escape(f"What {report.name} learned")
    return template.replace("{{title}}", title).replace("{{data}}", data.replace("<", r"\u003c"))


def facts(report: Report) -> list[list[str]]:
    """The facts at the top: title and text."""
    more = {"compared with": report.against} if report.against else {}
    return [[title, text] for title, text in {**report.facts, **more}.items()]


def sections(report: Report) -> list[dict[str, Any]]:
    """The page's sections in order: texts, tables, lines and heat maps; the first few are open."""
    found = [
        *_advice(report),
        _ranks(report),
        _spectra(report),
        *_similarity(report),
        *_correlation(report),
        *_table_7(report),
        *_overlap(report),
        _layers(report),
    ]
    return [{**section, "open": i < 2} for i, section in enumerate(found)]


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
        f"parameters instead of {a.before:,}, with {a.kept:.2%} of the energy ‖ΔW‖²"
    )
    pattern = json.dumps(a.config.rank_pattern, indent=1)
    head = {"kind": "text", "title": "Which rank is enough", "lines": [proposal, *a.evidence, *texts]}
    rows = [
        [_label(report, path), found.r, found.used, found.needed, found.rank, found.kept]
        for path, found in a.layers.items()
    ]
    percent = f"{100 * a.energy:.6g}%"
    table = {
        "kind": "table",
        "title": "Ranks, layer by layer",
        "text": f"The trained rank r; the effective rank of ΔW = s·B·A; the smallest rank that keeps "
        f"{percent} of ‖ΔW‖²; the proposed rank, and the share of ‖ΔW‖² that it keeps.",
        "columns": ["layer", "r", "effective rank", f"rank for {percent}", "proposed rank", "‖ΔW‖² kept"],
        "rows": rows,
    }
    return [{**head, "code": pattern}, table]


def _ranks(report: Report) -> dict[str, Any]:
    grid, layers, names = _grid(report)
    values = [[grid.get((layer, name)) for layer in layers] for name in names]
    panel = {"title": "", "rows": names, "columns": [str(x) for x in layers], "values": values}
    text = (
        "exp of the entropy of the shares of ‖ΔW‖²: 1 where one singular direction has all of it, r where "
        "all r have as much."
    )
    most = max((found.r for found in report.spectrum.layers.values()), default=1)
    return {
        "kind": "heat",
        "title": "Effective rank by layer",
        "text": text,
        "panels": [panel],
        "x": "block" if any(spot.layer is not None for spot in report.spots.values()) else "",
        "y": "target module",
        "max": most,
        "scale": "effective rank",
    }


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
    return {
        "kind": "lines",
        "title": "Singular values of ΔW",
        "text": "All panels have the same axes. Where a line falls off early, less rank would do.",
        "panels": [{"title": name, "lines": lines} for name, lines in panels.items()],
        "x": "singular direction, the strongest first",
        "y": "singular value (log)",
        "scale": ["first block", "last block"],
    }


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
    panels = [_phi(report, p, found.layers[p].phi) for p in paths]
    one = found.layers[paths[0]]
    rows, columns = one.phi.shape
    panels.append({**_phi(report, "", random_phi(one.d, rows, columns)), "title": "two random subspaces"})
    level = expected_phi(one.d, rows, columns)
    table = {
        "kind": "table",
        "title": f"In common with {report.against}, layer by layer",
        "text": "Cosine: 1 where the two ΔW are the same up to a factor, 0 where they have nothing to do "
        "with each other. φ of all directions that read (right singular vectors) and that write "
        "(left ones), each beside what two random subspaces would have in common.",
        "columns": ["layer", "cosine", "φ(1, 1)", "φ reads", "by chance", "φ writes", "by chance"],
        "rows": [
            [
                _label(report, p),
                report.alike[p].cosine if p in report.alike else None,
                s.at(1, 1),
                *_all_of(s),
                *_all_of(report.written.layers.get(p) if report.written else None),
            ]
            for p, s in found.layers.items()
        ],
    }
    return [
        {
            "kind": "heat",
            "title": similarity_title(report),
            "text": f"Directions of ΔW that read. {_PHI} Two random subspaces would have "
            f"φ({rows}, {columns}) = {level:.4f} in common on average, as in the last panel.",
            "panels": panels,
            "x": f"first j directions of {report.against}",
            "y": f"first i of {report.name}",
            "max": 1,
            "scale": "φ",
            "chance": level,
        },
        table,
    ]


def _all_of(found: Similarity | None) -> list[float | None]:
    """φ of all directions, and its level of chance."""
    return [None, None] if found is None else [float(found.phi[-1, -1]), found.by_chance(*found.phi.shape)]


def similarity_title(report: Report) -> str:
    """The comparison's title, with the paper's figures: of two ranks, or of two runs of one rank."""
    layers = report.similarity.layers.values() if report.similarity else ()
    same = all(s.phi.shape[0] == s.phi.shape[1] for s in layers)
    return f"Subspace similarity with {report.against} (figures {'4 and 7' if same else '3 and 6'})"


def _phi(report: Report, path: str, phi: Tensor) -> dict[str, Any]:
    count = [[str(i + 1) for i in range(n)] for n in phi.shape]
    values = [[round(x, 4) for x in row] for row in phi.tolist()]
    panel = {"rows": count[0], "columns": count[1], "values": values}
    if not path:
        return panel
    return {**panel, "title": _label(report, path), "group": report.spots[path].projection}


def _correlation(report: Report) -> list[dict[str, Any]]:
    found = report.correlation
    if found is None:
        return []
    names = [_label(report, path) for path in found.paths]
    values = [[None if x != x else round(x, 4) for x in row] for row in found.phi.tolist()]
    widths = {report.spectrum.layers[path].shape[1] for path in found.paths}
    levels = [expected_phi(d, found.rank, found.rank) for d in sorted(widths)]
    text = (
        f"φ({found.rank}, {found.rank}) of what each layer's ΔW reads with what each other's reads (appendix "
        "H.1); grey where the two read from spaces of different widths. Two random subspaces would have "
        f"{' or '.join(f'{level:.4f}' for level in levels)} in common on average, by their width."
    )
    return [
        {
            "kind": "heat",
            "title": "Similarity between layers",
            "text": text,
            "panels": [{"title": "", "rows": names, "columns": names, "values": values}],
            "x": "layer",
            "y": "layer",
            "max": 1,
            "scale": "φ",
            "chance": levels[0],
        }
    ]


def _table_7(report: Report) -> list[dict[str, Any]]:
    if not report.amplification:
        return []
    columns = ["layer", "r", "‖UᵀWVᵀ‖ of ΔW", "of W", "random", "by chance", "‖ΔW‖", "‖W‖", "amplification"]
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
    text = (
        "How much W does in r directions: in those of ΔW, in its own strongest, in random ones. "
        "Amplification is ‖ΔW‖ over the first of these: how much louder ΔW makes what W does there."
    )
    return [
        {"kind": "table", "title": "Amplification (table 7)", "text": text, "columns": columns, "rows": rows}
    ]


def _overlap(report: Report) -> list[dict[str, Any]]:
    if not report.overlap:
        return []
    paths = chosen(report, list(report.overlap))
    panels = [_phi(report, p, report.overlap[p].phi) for p in paths]
    one = report.overlap[paths[0]]
    panels.append({**_phi(report, "", one.random), "title": "random in place of ΔW"})
    level = expected_phi(one.d, *one.phi.shape)
    return [
        {
            "kind": "heat",
            "title": "Overlap with W (figure 8)",
            "text": f"The strongest tenth of W's singular directions and those of ΔW, which read. {_PHI} "
            f"Random directions in place of ΔW's would have {level:.4f} in common with all of W's.",
            "panels": panels,
            "x": "first j directions of ΔW",
            "y": "first i of W",
            "max": 1,
            "scale": "φ",
            "chance": level,
        }
    ]


def _layers(report: Report) -> dict[str, Any]:
    columns = ["layer", "‖A‖", "‖B‖", "‖ΔW‖", "stable rank", "shape"]
    if report.drift:
        columns += ["‖ΔW‖ / ‖W‖", "lost in bfloat16", "weights changed"]
    rows = []
    for path, n in report.norms.items():
        s = report.spectrum.layers.get(path)
        row: list[Any] = [_label(report, path), n.A, n.B, n.update, s.stable_rank if s else None]
        row.append(" x ".join(map(str, s.shape)) if s else "")
        if report.drift:
            d = report.drift.get(path)
            row += [n.relative, d.lost if d else None, d.moved if d else None]
        rows.append(row)
    text = "Frobenius norms. Stable rank: ‖ΔW‖² over the largest singular value squared."
    if report.drift:
        text += " Lost in bfloat16: the share of ΔW that rounding the merged weight takes away."
    return {"kind": "table", "title": "Norms", "text": text, "columns": columns, "rows": rows}
