"""Latency in inference: the base, an adapter merged into it, and the same adapter left unmerged."""

from __future__ import annotations

import harness
import torch
from models import ALL_LINEAR, MODELS, tokens, with_lorica, with_peft
from torch import nn

import lorica

R = 8
BATCHES = {"1×16": (1, 16), "1×128": (1, 128), "16×64": (16, 64)}
REPEATS = 5


def main() -> None:
    """Measure every model on every batch."""
    options = harness.options(__doc__)
    comparisons = []
    for model_name, make in MODELS.items():
        merged = with_lorica(make(), ALL_LINEAR, r=R)
        lorica.merge(merged)
        models: dict[str, nn.Module] = {
            "base": make(),
            "lorica, merged": merged,
            "lorica, unmerged": with_lorica(make(), ALL_LINEAR, r=R),
            "PEFT, unmerged": with_peft(make(), ALL_LINEAR, r=R),
        }
        for shape, (rows, length) in BATCHES.items():
            contestants = {
                name: harness.Contestant(forward(model.to(options.device).eval(), rows, length))
                for name, model in models.items()
            }
            comparisons.append(
                harness.alternate(f"{model_name}, {shape}", contestants, reference="base", options=options)
            )
    harness.publish(
        "merged_latency",
        title="Inference with a merged adapter",
        claim=(
            "A merged adapter adds no latency: the model has the base's own modules, and weights of the same "
            "shapes. Batches are given as rows × tokens."
        ),
        tables=[harness.table(comparisons, "")],
        data=harness.seconds(comparisons),
        settings={"r": R, "targets": "all-linear", "passes a turn": REPEATS},
        device=options.device,
        rounds=options.rounds,
    )


def forward(model: nn.Module, rows: int, length: int) -> harness.Work:
    """A few forward passes, so that one turn is longer than the clock's jitter."""
    batch = tokens(model, rows, length)

    @torch.inference_mode()
    def run(_: None) -> None:
        for _pass in range(REPEATS):
            model(**batch)

    return run


if __name__ == "__main__":
    main()
