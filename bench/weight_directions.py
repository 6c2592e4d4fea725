"""The paper's table 7 and figure 8: what W does in ΔW's directions, and which of W's directions these are.

Of the adapters that `paper_tables.py --table 6` leaves in runs/: query and value, ranks 4 and 64, two seeds.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import harness
import torch
from paper_tables import STUDIES, comparison

import lorica
from lorica import study
from lorica.compare.check import check
from lorica.compare.results import Results
from lorica.compare.runs import cells, choose
from lorica.study.modules import spots
from lorica.train.embedded import resolve_model

RANKS, PROJECTIONS = (4, 64), ("query", "value")
LAYER = 3  # of six, as the paper's 48 of 96
OWN = {4: (0.32, 21.67, 0.02, 6.91), 64: (1.90, 37.71, 0.33, 3.57)}
"""The paper's, layer 48's query: ‖UᵀWV‖ by ΔW's, W's and random directions, and ‖ΔW‖."""


def main() -> None:
    """Read the adapters, project, publish."""
    torch.set_num_threads(1)
    spec = comparison(STUDIES["6"])
    base = resolve_model(spec.laid("SST-2", f"q, v r={RANKS[0]}").model)
    runs = {cell.method: cell for cell in cells(spec, check(spec))}
    strength: dict[tuple[int, str, int], list[study.Amplification]] = {}
    shared: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for rank in RANKS:
        cell = runs[f"q, v r={rank}"]
        best = choose(cell, Results(Path(spec.output) / "results.jsonl"))
        for run in cell.at(best) if best is not None else ():
            place = Path(spec.output) / "runs" / run.key
            if not place.is_dir():
                raise SystemExit(f"no {place}: run paper_tables.py --table 6 here first")
            adapter = lorica.read(place)
            amplified, overlaps = study.amplification(adapter, base), study.overlap(adapter, base)
            where = spots(amplified.layers)
            for path, found in amplified.layers.items():
                layer = where[path].layer
                assert layer is not None
                strength.setdefault((rank, where[path].projection, layer), []).append(found)
            for path, panel in overlaps.layers.items():
                best = float(panel.phi[:, : min(4, panel.phi.shape[1])].max())
                chance = float(panel.random[:, : min(4, panel.random.shape[1])].max())
                shared.setdefault((rank, where[path].projection), []).append((best, chance))
    publish(strength, shared)


def publish(
    strength: dict[tuple[int, str, int], list[study.Amplification]],
    shared: dict[tuple[int, str], list[tuple[float, float]]],
) -> None:
    """Write the tables."""
    rows = []
    for rank in RANKS:
        for projection in PROJECTIONS:
            layers = sorted(layer for r, p, layer in strength if (r, p) == (rank, projection))
            one = [strength[rank, projection, layer] for layer in layers if layer == LAYER]
            every = [strength[rank, projection, layer] for layer in layers]
            for name, group in ((f"layer {LAYER}", one), ("all layers", every)):
                rows.append(line(f"{projection}, r = {rank}, {name}", [f for found in group for f in found]))
    factor = {
        rank: mean(found.factor for (r, _, _), group in strength.items() if r == rank for found in group)
        for rank in RANKS
    }
    above = [
        found.in_update > found.by_chance and found.in_update < found.in_weight
        for group in strength.values()
        for found in group
    ]
    top = {key: (mean(best for best, _ in pairs), mean(c for _, c in pairs)) for key, pairs in shared.items()}
    small, large = RANKS
    holds = factor[small] > factor[large] > 1
    harness.publish(
        "weight_directions",
        title="The paper's table 7 and figure 8: ΔW beside W",
        claim=(
            f"At rank {small} ΔW is {factor[small]:.2f} times as strong as W is in the same directions, at "
            f"rank {large} {factor[large]:.2f} times (means of layers, queries and values, and seeds); the "
            f"paper has 21.5 and 1.9 for one query of GPT-3. That the factor is above 1 and falls with the "
            f"rank {'holds' if holds else 'does not hold'} here. W is stronger in ΔW's directions than in "
            f"random ones, and weaker than in its own, in {sum(above)} of {len(above)} updates, as in the "
            "paper. "
            "With W's strongest tenth the first four directions at rank "
            f"{small} share at most "
            + " and ".join(
                f"φ = {top[small, projection][0]:.2f} ({projection}; random ones "
                f"{top[small, projection][1]:.2f})"
                for projection in PROJECTIONS
            )
            + "; the paper has barely 0.2."
        ),
        tables=[
            {
                "caption": "‖UᵀWV‖ with U and V of ΔW, of W and random, means of two seeds.",
                "columns": ["", "ΔW's", "W's", "random", "‖ΔW‖", "‖W‖", "‖ΔW‖ / ‖UᵀWV‖"],
                "rows": rows,
            },
            {
                "caption": "The paper's: the query of layer 48 of GPT-3, ‖W‖ = 61.95.",
                "columns": ["", "ΔW's", "W's", "random", "‖ΔW‖", "‖ΔW‖ / ‖UᵀWV‖"],
                "rows": [
                    [f"r = {rank}", *figures, f"{figures[3] / figures[0]:.1f}"]
                    for rank, figures in OWN.items()
                ],
            },
            {
                "caption": "The largest φ of ΔW's first four directions (inputs) and W's strongest "
                "tenth, mean of the layers.",
                "columns": ["", "ΔW", "random"],
                "rows": [
                    [
                        f"{projection}, r = {rank}",
                        f"{top[rank, projection][0]:.2f}",
                        f"{top[rank, projection][1]:.2f}",
                    ]
                    for rank in RANKS
                    for projection in PROJECTIONS
                ],
            },
        ],
        data={
            f"{projection} {layer} r={rank}": [vars(found) for found in group]
            for (rank, projection, layer), group in strength.items()
        },
        settings={"adapters": "q, v of paper_tables.py --table 6", "ranks": "4 and 64", "seeds": 2},
        device="cpu",
    )


def line(name: str, found: list[study.Amplification]) -> list[Any]:
    """Means of some updates."""
    columns = ("in_update", "in_weight", "in_random", "norm", "weight_norm", "factor")
    return [name, *(f"{mean(getattr(each, column) for each in found):.2f}" for column in columns)]


def mean(values: Any) -> float:
    """The mean."""
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
