"""Speed: the spectrum of an adapter of Llama-7B's shape from its factors, against that of dense products."""

from __future__ import annotations

import statistics
import time

import harness
import psutil
import torch

import lorica
from lorica import study

R, LAYERS = 16, 32
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}


def main() -> None:
    """Time the whole, and one dense decomposition of a 4096 × 4096 product."""
    options = harness.options(__doc__)
    adapter = made()
    process = psutil.Process()
    seconds = []
    for _ in range(options.warmup + options.rounds):
        start = time.perf_counter()
        study.spectrum(adapter)
        seconds.append(time.perf_counter() - start)
    peak = process.memory_info().rss
    whole = statistics.median(seconds[options.warmup :])
    f = adapter.factors["layers.0.q_proj"]
    start = time.perf_counter()
    torch.linalg.svdvals(f.B @ f.A)
    dense = time.perf_counter() - start
    # The other shapes are larger, so this is less than the dense way would take.
    extrapolated = dense * len(adapter.factors)
    harness.publish(
        "study_speed",
        title="Spectrum of a Llama-7B-shaped adapter",
        claim=(
            f"{len(adapter.factors)} matrices of rank {R} take {whole:.1f} s from their factors, with "
            f"{peak / 1e9:.2f} GB; one dense 4096 × 4096 product takes {dense:.1f} s, so as many take "
            f"{extrapolated / whole:.0f} times as long at least."
        ),
        tables=[
            {
                "caption": "Dense: one 4096 × 4096 product timed, times the number of matrices.",
                "columns": ["", "seconds"],
                "rows": [["from factors", f"{whole:.2f}"], ["dense, extrapolated", f"{extrapolated:.0f}"]],
            }
        ],
        data={"seconds": seconds, "dense": dense, "rss": peak},
        settings={"r": R, "matrices": len(adapter.factors)},
        device=options.device,
        rounds=options.rounds,
    )
    print(f"{whole:.2f} s, dense {dense:.1f} s each, {extrapolated / whole:.0f} times, {peak / 1e9:.2f} GB")


def made() -> lorica.Adapter:
    """Random factors."""
    draw = torch.Generator().manual_seed(0)
    factors = {
        f"layers.{i}.{name}": lorica.Factors(
            torch.randn(R, d_in, generator=draw), torch.randn(d_out, R, generator=draw), 1.0
        )
        for i in range(LAYERS)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return lorica.Adapter(lorica.LoraConfig(r=R, target_modules=list(SHAPES)), factors)


if __name__ == "__main__":
    main()
