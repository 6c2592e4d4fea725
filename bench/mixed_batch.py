"""One adapter for each row of a batch: against the base, and against PEFT's `adapter_names`."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import peft
import torch
from models import ALL_LINEAR, QUERY_VALUE, minilm, tokens
from torch import nn

import lorica

R = 8
BATCHES = {"64 adapters × 1 token": (64, 1), "16 adapters × 32 tokens": (16, 32)}
TARGETS = {"query and value": QUERY_VALUE, "all-linear": ALL_LINEAR}


def main() -> None:
    """Measure every batch with either set of targets."""
    options = harness.options(__doc__)
    comparisons, apart = [], {}
    for targets_name, targets in TARGETS.items():
        for batch_name, (rows, length) in BATCHES.items():
            names = [f"adapter{i}" for i in range(rows)]
            base = minilm().to(options.device).eval()
            ours = by_lorica(minilm().to(options.device).eval(), names, targets)
            theirs = by_peft(minilm().to(options.device).eval(), names, targets)
            batch = tokens(base, rows, length)
            setting = f"{batch_name}, {targets_name}"
            apart[setting] = furthest(ours, names, batch)
            lorica.mixed(ours, names)  # as `generate` does: once for all the tokens that follow
            comparisons.append(
                harness.alternate(
                    setting,
                    {
                        "base": harness.Contestant(partial(turn, base, batch)),
                        "lorica": harness.Contestant(partial(turn, ours, batch)),
                        "lorica, mixed anew": harness.Contestant(partial(turn_anew, ours, names, batch)),
                        "PEFT": harness.Contestant(partial(turn, theirs, {**batch, "adapter_names": names})),
                    },
                    reference="base",
                    options=options,
                )
            )
    speedup = {c.setting: c.median("PEFT") / c.median("lorica") for c in comparisons}
    anew = {c.setting: c.median("PEFT") / c.median("lorica, mixed anew") for c in comparisons}
    harness.publish(
        "mixed_batch",
        title="One adapter for each row",
        claim=(
            "A batch in which every row has an adapter of its own, in inference. lorica against PEFT: "
            + ", ".join(f"{ratio:.1f}× faster ({setting})" for setting, ratio in speedup.items())
            + "; with a mixture made anew for each batch, as PEFT does: "
            + ", ".join(f"{ratio:.1f}×" for ratio in anew.values())
            + f". Largest distance of a row's output from the same row run alone: {max(apart.values()):.0e}."
        ),
        tables=[harness.table(comparisons, "")],
        data={"seconds": harness.seconds(comparisons), "furthest": apart},
        settings={"model": "MiniLM", "r": R},
        device=options.device,
        rounds=options.rounds,
    )


def by_lorica(model: nn.Module, names: list[str], targets: list[str]) -> nn.Module:
    """A model with an adapter of each name, none of them zero."""
    for name in names:
        config = lorica.LoraConfig(r=R, target_modules=targets, init_lora_weights=False)
        lorica.adapt(model, config, name)
    return model


def by_peft(model: nn.Module, names: list[str], targets: list[str]) -> nn.Module:
    """The same, by PEFT."""
    config = peft.LoraConfig(r=R, target_modules=targets, init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return adapted.eval()


def turn(model: nn.Module, batch: dict[str, Any], _: None) -> None:
    """One forward pass."""
    forward(model, batch)


def turn_anew(model: nn.Module, names: list[str], batch: dict[str, Any], _: None) -> None:
    """One forward pass of a batch whose adapters were not mixed before."""
    with lorica.mixed(model, names):
        forward(model, batch)


@torch.inference_mode()
def forward(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The last hidden state."""
    return model(**batch).last_hidden_state


def furthest(model: nn.Module, names: list[str], batch: dict[str, torch.Tensor]) -> float:
    """The largest distance between a row in the mixed batch and the row alone."""
    with lorica.mixed(model, names):
        together = forward(model, batch)
    largest = 0.0
    for i, name in enumerate(names):
        with lorica.active(model, name):
            alone = forward(model, {key: value[i : i + 1] for key, value in batch.items()})
        largest = max(largest, float((together[i : i + 1] - alone).abs().max()))
    return largest


if __name__ == "__main__":
    main()
