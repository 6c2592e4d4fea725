"""Training step: forward, backward and AdamW, against the least that any adapter method can take.

That limit is the frozen model: the same model with nothing to train, forward and backward down to the
embeddings' output. `--only` takes a part of the rows, to try something, and writes nothing down.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import harness
import torch
from models import LORALIB, PEERS
from shapes import BERT, GPT2, LLAMA, MINILM, SHORT_LLAMA, VIT, Shape
from torch import Tensor, nn

LIMIT, FULL, OWN, PEFT = "frozen model", "full fine-tuning", "lorica", "PEFT"


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Args:
        name: what is special about it.
        shape: the model.
        r: the rank.
        dropout: of the adapters; the models' own is off.
        attention: adapt query and value alone, in place of every linear layer.
        dora: with DoRA's magnitudes.
        dtype: of the base.
        checkpointing: None, or whether blocks are checkpointed in torch's older, reentrant way.
        compiled: by `torch.compile`.
        rows: of a batch; None takes the shape's.
        length: tokens per row; None likewise.
    """

    name: str
    shape: Shape
    r: int = 8
    dropout: float = 0.0
    attention: bool = False
    dora: bool = False
    dtype: torch.dtype = torch.float32
    checkpointing: bool | None = None
    compiled: bool = False
    rows: int | None = None
    length: int | None = None

    @property
    def peers(self) -> list[str]:
        """The ways of adapting that can do this."""
        beyond = self.dora or self.compiled or self.checkpointing is not None or self.dtype != torch.float32
        return [name for name in PEERS if name != LORALIB or (self.shape.replaceable and not beyond)]


CASES = [
    Case("query and value", MINILM, attention=True),
    Case("all-linear", MINILM),
    Case("dropout 0.05", MINILM, dropout=0.05),
    Case("dropout 0.1", MINILM, dropout=0.1),
    Case("r 64", MINILM, r=64),
    Case("all-linear", BERT),
    Case("dropout 0.05", BERT, dropout=0.05),
    Case("all-linear", LLAMA),
    Case("dropout 0.05", LLAMA, dropout=0.05),
    Case("r 64", LLAMA, r=64),
    Case("64 tokens a row", LLAMA, rows=16, length=64),
    Case("2,048 tokens a row", LLAMA, rows=1, length=2_048),
    Case("DoRA", LLAMA, dora=True),
    Case("bfloat16", LLAMA, dtype=torch.bfloat16),
    Case("bfloat16, dropout 0.05", LLAMA, dtype=torch.bfloat16, dropout=0.05),
    Case("checkpointing, dropout 0.05", LLAMA, checkpointing=False, dropout=0.05),
    Case("reentrant checkpointing, dropout 0.05", LLAMA, checkpointing=True, dropout=0.05),
    Case("torch.compile, 2 layers", SHORT_LLAMA, compiled=True),
    Case("all-linear", GPT2),
    Case("dropout 0.05", GPT2, dropout=0.05),
    Case("all-linear", VIT),
    Case("dropout 0.05", VIT, dropout=0.05),
]


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose shape and name contain this")
    options = harness.options(__doc__, parser=parser)
    began = time.perf_counter()
    found: dict[str, list[harness.Comparison]] = {}
    for case in CASES:
        if options.only in f"{case.shape.name}: {case.name}":
            print(f"{case.shape.name}: ", end="", flush=True)
            found.setdefault(case.shape.name, []).append(measure(case, options))
            if not options.only:  # a run that is stopped leaves the rows that it has
                publish(found, options)
    print(f"{time.perf_counter() - began:.0f} s")


def publish(found: dict[str, list[harness.Comparison]], options: argparse.Namespace) -> None:
    """Write the rows down."""
    harness.publish(
        "step",
        title="Training step",
        claim=(
            "Forward, backward and AdamW of an all-linear step in float32, r 8 and without dropout, unless a "
            "row says otherwise. The limit for any adapter method is the frozen model: nothing to train, "
            "forward and backward down to the embeddings' output. The models' own dropout is off, so that "
            f"only the method's counts. {summary(list(found.values()))}"
        ),
        tables=[harness.table(comparisons, shape) for shape, comparisons in found.items()],
        data={shape: harness.seconds(comparisons) for shape, comparisons in found.items()},
        settings={},
        device=options.device,
        rounds=options.rounds,
        each_processor=True,
    )


def measure(case: Case, options: argparse.Namespace) -> harness.Comparison:
    """Time the ways of training under one case."""
    shape = case.shape
    rows, length = case.rows or shape.rows, case.length or shape.length
    targets = shape.attention if case.attention else shape.linear
    contestants = {}
    for name in (LIMIT, *case.peers, FULL):
        model = shape.make().to(options.device, case.dtype)
        if name == LIMIT:
            freeze(model)
        elif name != FULL:
            extra: dict[str, Any] = {"dora": True} if case.dora else {}
            model = PEERS[name](model, targets, r=case.r, dropout=case.dropout, **extra)
        model.train()
        if case.checkpointing is not None:
            checkpoint(model, reentrant=case.checkpointing)
        batch = shape.batch(model, rows, length)
        contestants[name] = harness.Contestant(step(model, batch, compiled=case.compiled))
    gc.collect()
    gc.freeze()  # or each turn would begin with a tenth of a second of collecting
    comparison = harness.alternate(case.name, contestants, reference=LIMIT, options=options)
    gc.unfreeze()
    torch.compiler.reset()
    return comparison


def step(model: nn.Module, batch: dict[str, Tensor], *, compiled: bool = False) -> harness.Work:
    """One training step of a model; the loss is as cheap as a loss can be."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True) if trainable else None
    call = cast("Callable[..., Any]", torch.compile(model) if compiled else model)

    def run(_: None) -> None:
        call(**batch).last_hidden_state[:, -1].float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def freeze(model: nn.Module) -> None:
    """Nothing to train, but what enters the first block asks for a gradient, so backward goes all the way."""
    model.requires_grad_(False)
    blocks: Any = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    anchor = torch.zeros((), dtype=next(model.parameters()).dtype, requires_grad=True)
    blocks[0].register_forward_pre_hook(lambda _block, args: (args[0] + anchor, *args[1:]))


def checkpoint(model: Any, *, reentrant: bool) -> None:
    """Keep nothing of the blocks but their inputs."""
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and not model.get_input_embeddings().weight.requires_grad:
        model.enable_input_require_grads()


def summary(shapes: Sequence[Sequence[harness.Comparison]]) -> str:
    """The range of the ratios to the limit, and to full fine-tuning."""
    every = [comparison for comparisons in shapes for comparison in comparisons]
    ranges = []
    for name in (OWN, PEFT, FULL):
        ratios = [comparison.ratio(name) for comparison in every]
        ranges.append(f"{name} {min(ratios):.2f} to {max(ratios):.2f}")
    slower = [c.setting for c in every if c.ratio(OWN) > c.ratio(FULL)]
    beside = f"slower than full fine-tuning in {len(slower)} of {len(every)} rows"
    return f"Over all rows: {', '.join(ranges)}; lorica is {beside}."


if __name__ == "__main__":
    main()
