"""Time of a training step as the rank, the layers and the adapters loaded grow, beside its arithmetic.

Of the adapters loaded one trains; the others are there, and should cost nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from models import tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import lorica
from lorica.errors import require

ROWS, LENGTH, WIDTH = 8, 64, 256
RANK, LAYERS, ADAPTERS = 8, 4, 1


class Axis(NamedTuple):
    """What grows: the name it has in `build`, what to call it, and its values."""

    argument: str
    name: str
    values: Sequence[int]


AXES = (
    Axis("rank", "rank", (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    Axis("layers", "layers", (2, 4, 8, 12, 18, 24)),
    Axis("adapters", "adapters loaded", (1, 4, 16, 64, 256)),
)


class Growth(NamedTuple):
    """How a step's time and arithmetic grow along an axis, over those of its first value."""

    axis: Axis
    comparison: harness.Comparison
    operations: dict[int, int]

    def time(self, value: int) -> float:
        """Times as long as the first value's step."""
        return self.comparison.ratio(str(value))

    def arithmetic(self, value: int) -> float:
        """Times as many multiplications and additions as in the first value's step."""
        return self.operations[value] / self.operations[self.axis.values[0]]

    def excess(self) -> float:
        """The most that time grew by, over what arithmetic did."""
        return max(self.time(value) / self.arithmetic(value) for value in self.axis.values)


def bert(layers: int) -> nn.Module:
    """A BERT-shaped encoder."""
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(num_hidden_layers=layers, **shape, **off), add_pooling_layer=False)


def llama(layers: int) -> nn.Module:
    """A Llama-shaped decoder, with grouped keys and values."""
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    return LlamaModel(LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **shape))


SHAPES: dict[str, Callable[[int], nn.Module]] = {"BERT-shaped": bert, "Llama-shaped": llama}


def main() -> None:
    """Measure both shapes along every axis; a table each, and one plot."""
    options = harness.options(__doc__)
    drawing()  # before minutes of measuring, if it is not there
    found = {shape: [grow(shape, axis, options) for axis in AXES] for shape in SHAPES}
    excess = max(growth.excess() for growths in found.values() for growth in growths)
    harness.publish(
        "growth",
        title="Growth of a training step",
        claim=(
            f"Forward, backward and AdamW, all-linear, {WIDTH} wide, from r={RANK}, {LAYERS} layers and one "
            f"adapter. Time grew by at most {excess:.2f}× what the arithmetic grew by; less where part of it "
            f"is fixed. ![growth](results/{plot_of(options.device).name})"
        ),
        tables=[table(shape, growth) for shape, growths in found.items() for growth in growths],
        data={
            shape: {
                growth.axis.argument: {
                    "seconds": harness.seconds([growth.comparison]),
                    "operations": growth.operations,
                }
                for growth in growths
            }
            for shape, growths in found.items()
        },
        settings={"rows": ROWS, "tokens a row": LENGTH, "width": WIDTH},
        device=options.device,
        rounds=options.rounds,
    )
    if options.rounds >= harness.ROUNDS:
        plot(found, plot_of(options.device))


def plot_of(device: str) -> Path:
    """Where the plot goes; a GPU's beside the CPU's."""
    return harness.RESULTS / ("growth.png" if device == "cpu" else f"growth.{device.partition(':')[0]}.png")


def grow(shape: str, axis: Axis, options: argparse.Namespace) -> Growth:
    """Measure one shape along one axis; all values take turns."""
    contestants, operations = {}, {}
    for value in axis.values:
        model = build(shape, **{axis.argument: value}).to(options.device).train()
        run = step(model)
        with FlopCounterMode(display=False) as counter:
            run(None)
        operations[value] = counter.get_total_flops()
        contestants[str(value)] = harness.Contestant(run)
    comparison = harness.alternate(
        f"{shape}, {axis.name}", contestants, reference=str(axis.values[0]), options=options
    )
    growth = Growth(axis, comparison, operations)
    print("  arithmetic: " + ", ".join(f"{v}: {growth.arithmetic(v):.2f}×" for v in axis.values), flush=True)
    return growth


def build(shape: str, *, rank: int = RANK, layers: int = LAYERS, adapters: int = ADAPTERS) -> nn.Module:
    """A model with adapters, of which the first trains."""
    torch.manual_seed(0)
    model = SHAPES[shape](layers)
    config = lorica.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    lorica.adapt(model, config, "trained", seed=0)
    value = lorica.extract(model, "trained")
    for i in range(1, adapters):
        lorica.attach(model, value, f"loaded{i}")
    return model


def step(model: nn.Module) -> harness.Work:
    """A training step; the loss is as cheap as a loss can be."""
    batch = tokens(model, ROWS, LENGTH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def run(_: None) -> None:
        model(**batch).last_hidden_state[:, -1].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def table(shape: str, growth: Growth) -> dict[str, Any]:
    """A row of times, and under it how time and arithmetic grew."""
    values = growth.axis.values
    return {
        "caption": f"{shape}, by {growth.axis.name}",
        "columns": [growth.axis.name, *map(str, values)],
        "rows": [
            ["step, ms", *(f"{1e3 * growth.comparison.median(str(v)):.1f}" for v in values)],
            ["time", *(f"{growth.time(v):.2f}×" for v in values)],
            ["arithmetic", *(f"{growth.arithmetic(v):.2f}×" for v in values)],
        ],
    }


def drawing() -> Any:
    """What plots are drawn with, or an error that says how to get it."""
    return require("matplotlib.figure", extra="study")


def plot(found: Mapping[str, Sequence[Growth]], path: Path) -> None:
    """Draw a panel an axis: measured growth with marks, that of the arithmetic dashed."""
    figure = drawing().Figure(figsize=(4 * len(AXES), 3.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), squeeze=False)[0]
    for i, (panel, axis) in enumerate(zip(panels, AXES, strict=True)):
        for j, (shape, growths) in enumerate(found.items()):
            panel.plot(
                axis.values, [growths[i].time(v) for v in axis.values], f"C{j}o-", label=f"{shape}: time"
            )
            panel.plot(
                axis.values,
                [growths[i].arithmetic(v) for v in axis.values],
                f"C{j}--",
                label=f"{shape}: arithmetic",
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(axis.values, [str(v) for v in axis.values])
        panel.yaxis.set_major_formatter("{x:g}×")
        panel.set_ylim(bottom=0.5)
        panel.set_xlabel(axis.name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training step, over that of the first value")
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)
    print(f"wrote {path.relative_to(harness.RESULTS.parents[1])}")


if __name__ == "__main__":
    main()
