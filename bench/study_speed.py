"""Speed and memory of a study: spectra from factors against those of dense products, and a whole report."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import harness
import torch
from quality_rotten_tomatoes import DATA

import lorica
from lorica import study

R, LAYERS, WIDTH = 16, 32, 4096
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (WIDTH, WIDTH)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, WIDTH)),
    "down_proj": (WIDTH, 11008),
}
RELEASED = DATA / "roberta_base_lora_mnli.bin"


def main() -> None:
    """Time the spectra and one dense decomposition, each in a process of its own; then the command."""
    options = harness.options(__doc__)
    if not RELEASED.is_file():
        raise SystemExit(f"no file {RELEASED}; set LORICA_DATA to the folder that holds it")
    seconds, peak = harness.apart(spectra, options.warmup, options.rounds)
    dense, dense_peak = harness.apart(dense_spectrum)
    reports = [report() for _ in range(options.rounds)]
    whole, count = statistics.median(seconds), LAYERS * len(SHAPES)
    extrapolated = count * dense
    claim = (
        f"The spectra of {count} matrices of rank {R} take {whole:.2f} s from their factors, and the whole "
        f"process {peak / 1e9:.2f} GB. The singular values of one dense {WIDTH} × {WIDTH} product take "
        f"{dense:.1f} s; as many of these, though many of the matrices are larger, would take "
        f"{extrapolated / whole:,.0f} times as long. `lorica study` on RoBERTa-base's 24 matrices takes "
        f"{statistics.median(reports):.1f} s from the shell's prompt to the page."
    )
    rows = [
        ["from factors", f"{whole:.2f} s", f"{peak / 1e9:.2f} GB"],
        ["dense, one matrix timed", f"{extrapolated:,.0f} s", f"{dense_peak / 1e9:.2f} GB"],
    ]
    print(claim)
    harness.publish(
        "study_speed",
        title="Studying an adapter",
        claim=claim,
        tables=[{"caption": f"{count} spectra.", "columns": ["", "time", "process's peak"], "rows": rows}],
        data={"seconds": seconds, "peak": peak, "dense": dense, "dense peak": dense_peak, "reports": reports},
        settings={"r": R, "matrices": count},
        device=options.device,
        rounds=options.rounds,
    )


def spectra(warmup: int, rounds: int) -> tuple[list[float], int]:
    """Seconds of each round, and the process's peak memory in bytes."""
    adapter = made()
    seconds = []
    for turn in range(warmup + rounds):
        start = time.perf_counter()
        study.spectrum(adapter)
        if turn >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds, harness.resident("VmHWM")


def dense_spectrum() -> tuple[float, int]:
    """Seconds that one dense product takes to be formed and decomposed, and the process's peak in bytes."""
    f = made(layers=1).factors["layers.0.q_proj"]
    start = time.perf_counter()
    torch.linalg.svdvals(f.B @ f.A)
    return time.perf_counter() - start, harness.resident("VmHWM")


def report() -> float:
    """Seconds of the command that writes the whole report."""
    with tempfile.TemporaryDirectory() as folder:
        command: list[Any] = [sys.executable, "-m", "lorica", "study", RELEASED, "--alpha", "16"]
        start = time.perf_counter()
        subprocess.run([*command, "--output", folder], check=True, capture_output=True)
        return time.perf_counter() - start


def made(layers: int = LAYERS) -> lorica.Adapter:
    """Random factors."""
    draw = torch.Generator().manual_seed(0)
    factors = {
        f"layers.{i}.{name}": lorica.Factors(
            torch.randn(R, d_in, generator=draw), torch.randn(d_out, R, generator=draw), 1.0
        )
        for i in range(layers)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return lorica.Adapter(lorica.LoraConfig(r=R, target_modules=list(SHAPES)), factors)


if __name__ == "__main__":
    main()
