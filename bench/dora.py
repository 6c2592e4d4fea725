"""DoRA's training step, against LoRA's, here and in PEFT."""

from __future__ import annotations

import harness
import peft
from models import ALL_LINEAR, MODELS, with_lorica, with_peft
from step import step
from torch import nn
from transformers import BertModel

import lorica

R = 8


def main() -> None:
    """Measure every model."""
    options = harness.options(__doc__)
    comparisons = []
    for model_name, make in MODELS.items():
        models: dict[str, nn.Module] = {
            "lorica, LoRA": with_lorica(make(), ALL_LINEAR, r=R),
            "lorica, DoRA": dora_lorica(make()),
            "PEFT, LoRA": with_peft(make(), ALL_LINEAR, r=R),
            "PEFT, DoRA": dora_peft(make()),
        }
        contestants = {
            name: harness.Contestant(step(model.to(options.device).train())) for name, model in models.items()
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
        settings={"r": R},
        device=options.device,
        rounds=options.rounds,
    )


def dora_lorica(model: BertModel) -> nn.Module:
    """Adapted by lorica with DoRA."""
    return lorica.adapt(
        model, lorica.LoraConfig(r=R, lora_alpha=2 * R, target_modules=ALL_LINEAR, use_dora=True)
    )


def dora_peft(model: BertModel) -> nn.Module:
    """Adapted by PEFT with DoRA."""
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=ALL_LINEAR, use_dora=True)
    return peft.get_peft_model(model, config)


if __name__ == "__main__":
    main()
