"""Switching a merged adapter: against one copy of the adapted weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import harness
import torch
from models import ALL_LINEAR, MODELS, with_lorica
from torch import Tensor, nn

import lorica

R = 8
COPY = "one copy of the weights"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measure every model in either dtype."""
    options = harness.options(__doc__)
    comparisons = []
    for model_name, make in MODELS.items():
        for dtype_name, dtype in DTYPES.items():
            base = make()
            nn.Module.to(base, dtype)
            model = with_lorica(base, ALL_LINEAR, r=R).to(options.device)
            config = lorica.LoraConfig(r=R, target_modules=ALL_LINEAR, init_lora_weights=False)
            lorica.adapt(model, config, "other")
            weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
            copies = [torch.empty_like(weight) for weight in weights]
            lorica.merge(model, "other")
            comparisons.append(
                harness.alternate(
                    f"{model_name}, {dtype_name}",
                    {
                        COPY: harness.Contestant(partial(copy_all, copies, weights)),
                        "switch": harness.Contestant(partial(switch, model, itertools.count())),
                    },
                    reference=COPY,
                    options=options,
                )
            )
    harness.publish(
        "switch",
        title="Switching a merged adapter",
        claim=(
            "`lorica.switch` computes W0 + scale·B·A of another adapter afresh, for every adapted weight, "
            "and puts it where the first one was; against copying these weights once."
        ),
        tables=[harness.table(comparisons, "")],
        data=harness.seconds(comparisons),
        settings={"r": R, "targets": "all-linear"},
        device=options.device,
        rounds=options.rounds,
    )


def copy_all(copies: list[Tensor], weights: list[Tensor], _: None) -> None:
    """Copy every weight once."""
    torch._foreach_copy_(copies, weights)


def switch(model: nn.Module, turns: Iterator[int], _: None) -> None:
    """Switch to the adapter that is not merged."""
    lorica.switch(model, ("default", "other")[next(turns) % 2])


if __name__ == "__main__":
    main()
