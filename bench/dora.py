"""DoRA's training step, against LoRA's, here and in PEFT."""

from __future__ import annotations

import harness
from models import ALL_LINEAR, MODELS, tokens, with_lorica, with_peft
from step import step
from torch import nn

ROWS, LENGTH, R = 16, 64, 8


def main() -> None:
    """Measure every model."""
    options = harness.options(__doc__)
    comparisons = []
    for model_name, make in MODELS.items():
        models: dict[str, nn.Module] = {
            "lorica, LoRA": with_lorica(make(), ALL_LINEAR, r=R),
            "lorica, DoRA": with_lorica(make(), ALL_LINEAR, r=R, dora=True),
            "PEFT, LoRA": with_peft(make(), ALL_LINEAR, r=R),
            "PEFT, DoRA": with_peft(make(), ALL_LINEAR, r=R, dora=True),
        }
        contestants = {
            name: harness.Contestant(step(model.to(options.device).train(), tokens(model, ROWS, LENGTH)))
            for name, model in models.items()
        }
        comparisons.append(
            harness.alternate(model_name, contestants, reference="lorica, LoRA", options=options)
        )
    harness.publish(
        "dora",
        title="DoRA",
        claim=(
            "Forward, backward and AdamW of an all-linear step, dropout 0. lorica takes the norm of "
            "W0 + s·B·A from two thin products and never forms that matrix."
        ),
        tables=[harness.table(comparisons, "")],
        data=harness.seconds(comparisons),
        settings={"rows": ROWS, "tokens a row": LENGTH, "r": R},
        device=options.device,
        rounds=options.rounds,
    )


if __name__ == "__main__":
    main()
