"""What it costs to adapt a model, and to make or load 64 more adapters on it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import harness
import peft
from models import ALL_LINEAR, MODELS, minilm

import lorica

R, MORE = 8, 64


def main() -> None:
    """Measure the first adapter on every model, and 64 more of them on the small one."""
    options = harness.options(__doc__)
    first = []
    for model_name, make in MODELS.items():
        base = make().to(options.device)
        fresh = lambda base=base: deepcopy(base)  # noqa: E731
        contestants = {
            "PEFT": harness.Contestant(adapt_peft, fresh),
            "lorica": harness.Contestant(adapt_lorica, fresh),
        }
        first.append(
            harness.alternate(f"{model_name}, first adapter", contestants, reference="PEFT", options=options)
        )
    # Peers take up to half a minute a turn here: one to warm up is enough.
    options.warmup = 1
    base = minilm().to(options.device)

    def after(adapt: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: adapt(deepcopy(base))

    with tempfile.TemporaryDirectory() as folder:
        lorica.save(adapt_lorica(deepcopy(base)), folder)
        works = {
            f"MiniLM, {MORE} more": (more_peft, more_lorica),
            f"MiniLM, {MORE} more from disk": (loader_peft(folder), loader_lorica(folder)),
        }
        more = [
            harness.alternate(
                setting,
                {
                    "PEFT": harness.Contestant(with_peft, after(adapt_peft)),
                    "lorica": harness.Contestant(with_lorica, after(adapt_lorica)),
                },
                reference="PEFT",
                options=options,
            )
            for setting, (with_peft, with_lorica) in works.items()
        ]
    harness.publish(
        "adapt_time",
        title="Adapting a model",
        claim=(
            f"Time to put a first all-linear adapter on a model, and {MORE} more beside it: made, which "
            "leaves lorica's active and trainable and PEFT's neither; and loaded from a folder."
        ),
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


def loader_peft(folder: str | Path) -> Callable[[Any], None]:
    """More adapters from disk, by PEFT."""

    def load(model: Any) -> None:
        for i in range(MORE):
            model.load_adapter(str(folder), f"adapter{i}")

    return load


def loader_lorica(folder: str | Path) -> Callable[[Any], None]:
    """More adapters from disk, by lorica."""

    def load(model: Any) -> None:
        for i in range(MORE):
            lorica.load(model, folder, f"adapter{i}")

    return load


if __name__ == "__main__":
    main()
