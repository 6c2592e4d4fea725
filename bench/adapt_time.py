"""What it costs to adapt a model, and to put 64 more adapters on it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import harness
import peft
from models import ALL_LINEAR, MODELS

import lorica

R, MORE = 8, 64


def main() -> None:
    """Measure every model: the first adapter, then 64 more beside it."""
    options = harness.options(__doc__)
    first, more = [], []
    for model_name, make in MODELS.items():
        base = make().to(options.device)

        def after(adapt: Callable[[Any], Any], base: Any = base) -> Callable[[], Any]:
            return lambda: adapt(deepcopy(base))

        first.append(
            harness.alternate(
                f"{model_name}, first adapter",
                {
                    "PEFT": harness.Contestant(adapt_peft, lambda base=base: deepcopy(base)),
                    "lorica": harness.Contestant(adapt_lorica, lambda base=base: deepcopy(base)),
                },
                reference="PEFT",
                options=options,
            )
        )
        more.append(
            harness.alternate(
                f"{model_name}, {MORE} more",
                {
                    "PEFT": harness.Contestant(more_peft, after(adapt_peft)),
                    "lorica": harness.Contestant(more_lorica, after(adapt_lorica)),
                },
                reference="PEFT",
                options=options,
            )
        )
    harness.publish(
        "adapt_time",
        title="Adapting a model",
        claim=f"Time to put a first all-linear adapter on a model, and {MORE} more beside it.",
        tables=[harness.table(first + more, "")],
        data=harness.seconds(first + more),
        settings={"r": R},
        device=options.device,
        rounds=options.rounds,
    )


def adapt_peft(model: Any) -> Any:
    """The first adapter, by PEFT."""
    return peft.get_peft_model(model, peft.LoraConfig(r=R, target_modules=ALL_LINEAR))


def adapt_lorica(model: Any) -> Any:
    """The first adapter, by lorica."""
    return lorica.adapt(model, lorica.LoraConfig(r=R, target_modules=ALL_LINEAR))


def more_peft(model: Any) -> None:
    """More adapters, by PEFT."""
    for i in range(MORE):
        model.add_adapter(f"adapter{i}", peft.LoraConfig(r=R, target_modules=ALL_LINEAR))


def more_lorica(model: Any) -> None:
    """More adapters, by lorica."""
    for i in range(MORE):
        lorica.adapt(model, lorica.LoraConfig(r=R, target_modules=ALL_LINEAR), name=f"adapter{i}")


if __name__ == "__main__":
    main()
