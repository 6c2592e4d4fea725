"""What adapting a model costs, 64 more adapters on it, made or loaded, and one more beside all those."""

from __future__ import annotations

import argparse
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
    ahead_peft, ahead_lorica = adapt_peft(deepcopy(base)), adapt_lorica(deepcopy(base))
    growth = [one_more("MiniLM, one more beside 1", ahead_peft, ahead_lorica, options)]
    more_peft(ahead_peft)
    more_lorica(ahead_lorica)
    growth += [one_more(f"MiniLM, one more beside {1 + MORE}", ahead_peft, ahead_lorica, options)]
    harness.publish(
        "adapt_time",
        title="Adapting a model",
        claim=(
            f"Time to put a first all-linear adapter on a model, and {MORE} more beside it: made, which "
            "leaves lorica's active and trainable and PEFT's neither; and loaded from a folder. The last "
            "two rows say whether an adapter costs more the more there are."
        ),
        tables=[harness.table(first + more + growth, "")],
        data=harness.seconds(first + more + growth),
        settings={"r": R},
        device=options.device,
        rounds=options.rounds,
    )


def one_more(setting: str, by_peft: Any, by_lorica: Any, options: argparse.Namespace) -> harness.Comparison:
    """Add one adapter to models that carry some, and take it off again before the next turn."""

    def without_peft() -> Any:
        if "extra" in by_peft.peft_config:
            by_peft.delete_adapter("extra")
        return by_peft

    def without_lorica() -> Any:
        if "extra" in lorica.adapters(by_lorica):
            lorica.detach(by_lorica, "extra")
        return by_lorica

    contestants = {
        "PEFT": harness.Contestant(lambda model: model.add_adapter("extra", config_peft()), without_peft),
        "lorica": harness.Contestant(
            lambda model: lorica.adapt(model, config_lorica(), "extra"), without_lorica
        ),
    }
    result = harness.alternate(setting, contestants, reference="PEFT", options=options)
    without_peft()
    without_lorica()
    return result


def config_peft() -> peft.LoraConfig:
    """What PEFT is asked for, each time anew."""
    return peft.LoraConfig(r=R, target_modules=ALL_LINEAR)


def config_lorica() -> lorica.LoraConfig:
    """What lorica is asked for, each time anew."""
    return lorica.LoraConfig(r=R, target_modules=ALL_LINEAR)


def adapt_peft(model: Any) -> Any:
    """The first adapter, by PEFT."""
    return peft.get_peft_model(model, config_peft())


def adapt_lorica(model: Any) -> Any:
    """The first adapter, by lorica."""
    return lorica.adapt(model, config_lorica())


def more_peft(model: Any) -> None:
    """More adapters, by PEFT."""
    for i in range(MORE):
        model.add_adapter(f"adapter{i}", config_peft())


def more_lorica(model: Any) -> None:
    """More adapters, by lorica."""
    for i in range(MORE):
        lorica.adapt(model, config_lorica(), name=f"adapter{i}")


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
