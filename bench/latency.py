"""Latency of inference, as in the paper's table 1 and figure 5: adapter layers cost it, a merged update not.

One forward pass of a GPT-2-shaped decoder over batch × length × bottleneck: the base, LoRA merged and
unmerged, and the adapter layers of Lin (AdapterL) and Houlsby (AdapterH); then AdapterDrop, with adapters
left out of more and more of the lowest blocks.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import torch
from matplotlib.figure import Figure
from models import tokens
from torch import nn
from transformers import GPT2Config, GPT2Model

import lorica

TRIALS = 100
LAYERS, WIDTH, HEADS = 6, 384, 6
R = 8
BOTTLENECKS = (8, 32, 96)
SHAPES = {f"{rows}×{length}": (rows, length) for rows in (1, 4) for length in (16, 64, 128)}
DROPPED_SHAPE = (1, 64)
FIGURE = "latency.png"


def main() -> None:
    """Measure the grid and AdapterDrop, draw the heat map, publish."""
    options = harness.options(__doc__, rounds=TRIALS)
    models = {name: model.to(options.device).eval() for name, model in contestants().items()}
    left_out = {name: model.to(options.device).eval() for name, model in dropped().items()}
    gc.freeze()  # the collection before each of thousands of turns would take longer than they do
    comparisons = [
        harness.alternate(shape, turns(models, rows, length), reference="base", options=options)
        for shape, (rows, length) in SHAPES.items()
    ]
    dropping = harness.alternate(
        "×".join(map(str, DROPPED_SHAPE)), turns(left_out, *DROPPED_SHAPE), reference="base", options=options
    )
    if options.rounds >= harness.ROUNDS:
        heat_map(comparisons, harness.RESULTS / FIGURE)
    harness.publish(
        "latency",
        title="Latency of adapter layers and of LoRA",
        claim=claim(comparisons, dropping),
        tables=[grid_table(comparisons), drop_table(dropping)],
        data=[*map(milliseconds, comparisons), {**milliseconds(dropping), "of": "AdapterDrop"}],
        settings={"decoder": f"GPT-2 shape, {LAYERS}×{WIDTH}, no head", "r of LoRA": R, "targets": "c_attn"},
        device=options.device,
        rounds=options.rounds,
    )


def base() -> GPT2Model:
    """The decoder, with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=30_000, use_cache=False)
    return GPT2Model(config)


def contestants() -> dict[str, nn.Module]:
    """Name → model."""
    update = lorica.LoraConfig(r=R, lora_alpha=2 * R, target_modules=["c_attn"])
    merged = lorica.adapt(base(), update, seed=0)
    lorica.merge(merged)
    models: dict[str, nn.Module] = {
        "base": base(),
        "LoRA, merged": merged,
        "LoRA, unmerged": lorica.adapt(base(), update, seed=0),
    }
    for r in BOTTLENECKS:
        models[f"AdapterL r={r}"] = lorica.adapt(base(), lorica.AdapterLConfig(bottleneck=r), seed=0)
        models[f"AdapterH r={r}"] = lorica.adapt(base(), lorica.AdapterHConfig(bottleneck=r), seed=0)
    return models


def dropped() -> dict[str, nn.Module]:
    """The base, and AdapterDrop with adapters in all blocks, in all but the lowest, and so on."""
    models: dict[str, nn.Module] = {"base": base()}
    for n in range(LAYERS):
        config = lorica.AdapterDConfig(bottleneck=BOTTLENECKS[1], dropped=n)
        models[f"{n} dropped"] = lorica.adapt(base(), config, seed=0)
    return models


def turns(models: Mapping[str, nn.Module], rows: int, length: int) -> dict[str, harness.Contestant]:
    """A forward pass of each on the same tokens."""
    return {name: harness.Contestant(forward(model, rows, length)) for name, model in models.items()}


def forward(model: nn.Module, rows: int, length: int) -> harness.Work:
    """One pass, as the paper times it."""
    batch = tokens(model, rows, length)

    @torch.inference_mode()
    def run(_: None) -> None:
        model(**batch)

    return run


def over_base(comparison: harness.Comparison, name: str) -> float:
    """Percentage over the base: the median over trials of the ratio within each."""
    return 100 * (comparison.ratio(name) - 1)


def noise(comparison: harness.Comparison) -> float:
    """How far trials of the base are from one another: their quartile spread, in percent of the median."""
    return 100 * comparison.spread("base") / comparison.median("base")


def milliseconds(comparison: harness.Comparison) -> dict[str, Any]:
    """What all trials of a shape come to, in milliseconds."""
    found = {
        name: {
            "mean": round(1e3 * statistics.mean(seconds), 4),
            "deviation": round(1e3 * statistics.stdev(seconds), 4),
            "median": round(1e3 * comparison.median(name), 4),
            "over base, %": round(over_base(comparison, name), 2),
        }
        for name, seconds in comparison.seconds.items()
    }
    return {"shape": comparison.setting, "trials": len(comparison.seconds["base"]), "models": found}


def grid_table(comparisons: list[harness.Comparison]) -> dict[str, Any]:
    """The paper's table 1: a column a shape."""
    names = list(comparisons[0].seconds)
    rows = [[name, *(cell(comparison, name) for comparison in comparisons)] for name in names]
    return {
        "caption": "One forward pass in milliseconds: mean ± standard deviation of all trials, and the "
        "median of the ratio to the base in the same round. Columns are rows × tokens.\n\n"
        f"![heat map](results/{FIGURE})",
        "columns": ["", *(comparison.setting for comparison in comparisons)],
        "rows": rows,
    }


def drop_table(comparison: harness.Comparison) -> dict[str, Any]:
    """AdapterDrop: a row each number of dropped blocks."""
    return {
        "caption": f"AdapterDrop, bottleneck {BOTTLENECKS[1]}, {comparison.setting} tokens.",
        "columns": ["", "ms"],
        "rows": [[name, cell(comparison, name)] for name in comparison.seconds],
    }


def cell(comparison: harness.Comparison, name: str) -> str:
    """Mean ± standard deviation in milliseconds, and the percentage over the base."""
    seconds = comparison.seconds[name]
    spread = f"{1e3 * statistics.mean(seconds):.2f} ± {1e3 * statistics.stdev(seconds):.2f}"
    return spread if name == "base" else f"{spread} ({over_base(comparison, name):+.1f} %)"


def claim(comparisons: list[harness.Comparison], dropping: harness.Comparison) -> str:
    """What it comes to, in a few sentences."""
    merged = max((over_base(c, "LoRA, merged") for c in comparisons), key=abs)
    worst = {
        kind: max(over_base(c, name) for c in comparisons for name in c.seconds if name.startswith(kind))
        for kind in ("AdapterL", "AdapterH")
    }
    unmerged = max(over_base(c, "LoRA, unmerged") for c in comparisons)
    cost = [over_base(dropping, f"{n} dropped") for n in range(LAYERS)]
    falls = sum(a > b for a, b in itertools.pairwise(cost))
    return (
        f"LoRA merged is within {abs(merged):.1f} % of the base everywhere (trials of the base itself differ "
        f"by up to {max(map(noise, comparisons)):.1f} %); unmerged it costs up to {unmerged:.0f} %, AdapterL "
        f"{worst['AdapterL']:.0f} %, AdapterH {worst['AdapterH']:.0f} %. With adapters left out "
        f"of the lowest blocks one after another, the cost of AdapterP falls from {cost[0]:.1f} % to "
        f"{cost[-1]:.1f} % ({falls} of {LAYERS - 1} steps down)."
    )


def heat_map(comparisons: list[harness.Comparison], path: Path) -> None:
    """The paper's figure 5: percentage over the base, by shape and bottleneck, AdapterH beside AdapterL."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    kinds = ("AdapterH", "AdapterL")
    values = {
        kind: [[over_base(c, f"{kind} r={r}") for c in comparisons] for r in BOTTLENECKS] for kind in kinds
    }
    top = max(value for kind in kinds for row in values[kind] for value in row)
    image: Any = None
    for axis, kind in zip(axes, kinds, strict=True):
        image = axis.imshow(values[kind], vmin=0, vmax=math.ceil(top), aspect="auto", cmap="viridis")
        for y, row in enumerate(values[kind]):
            for x, value in enumerate(row):
                color = "white" if value < 0.6 * top else "black"
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
        axis.set_title(f"{kind}, % over the base", fontsize=9)
        axis.set_xticks(range(len(comparisons)), [c.setting for c in comparisons], fontsize=7)
        axis.set_yticks(range(len(BOTTLENECKS)), [str(r) for r in BOTTLENECKS], fontsize=7)
        axis.set_xlabel("rows × tokens", fontsize=8)
        axis.set_ylabel("bottleneck", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
