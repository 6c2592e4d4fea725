"""A small pretrained decoder without a download: GPT-2's shape, 6 layers of width 256, a vocabulary of 8,192.

    python bench/pretrain_tiny_gpt2.py --minutes 60

It reads WikiText-2 and fourteen novels (see `plain_text`) and leaves a model folder that `from_pretrained`
loads. Stopped at any moment it goes on from its last checkpoint when called again, and a larger budget takes
a finished model further. The rate climbs over the first 2 % of the budget and falls to nothing over its last
40 %; under ``--steps`` the same call gives the same model, under ``--minutes`` as much as the time allows.
These are minutes of the main thread on a processor, so that a machine which does other things too, or puts
this aside, gives no worse a model, but a later one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from plain_text import SOURCES, Corpus, end_token, prepare
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lorica.checkpoint.atomic import replace_files
from lorica.errors import require
from lorica.train.console import duration

CONTEXT = 256
VOCABULARY = 8192
SHAPE: dict[str, Any] = {"n_layer": 6, "n_embd": 256, "n_head": 4}
WARMUP, COOLDOWN = 0.02, 0.4
TRIAL = 1_000_000
PLOT = harness.RESULTS / "pretrain_tiny_gpt2.png"


@dataclass
class State:
    """How far a run has come.

    Args:
        step: optimizer steps taken.
        seconds: seconds that they took, other work on the machine included.
        processor_seconds: of these, those in which the main thread computed.
        training: every tenth step: step, tokens, seconds, mean loss since the last entry.
        validation: now and then: step, tokens, seconds, source → mean loss a token.
    """

    step: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    training: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    """Prepare the text, train until the budget is spent, write the model and its curve."""
    options = parse()
    torch.manual_seed(options.seed)
    work = options.out.with_name(options.out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, corpus = prepare(options.data, work / "text", VOCABULARY, CONTEXT)
    config = GPT2Config(
        **SHAPE,
        n_positions=CONTEXT,
        vocab_size=len(tokenizer),
        bos_token_id=end_token(tokenizer),
        eos_token_id=end_token(tokenizer),
        # Hardly a text is seen twice: there is nothing to keep the model from learning by heart.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = make_optimizer(model, options.learning_rate)
    state = resume(work, model, optimizer, options)
    finished = train(model, optimizer, state, corpus, tokenizer, options, work)
    if finished:
        if not (state.validation and state.validation[-1]["whole"]):
            state.validation.append(validate(model, corpus, state, options, blocks=None))
        save(work, model, optimizer, state, options)
        export(model, tokenizer, options.out)
        publish(model, corpus, state, options)


def parse() -> argparse.Namespace:
    """The flags."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="minutes of processor time in all (default 60)"
    )
    parser.add_argument("--steps", type=int, help="steps in all, whatever time they take (default: none)")
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {CONTEXT} tokens a step (default 8)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="its peak (default 2e-3)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default 0)")
    parser.add_argument(
        "--save-every", type=float, default=3.0, help="minutes between checkpoints (default 3)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("LORICA_DATA") or beside), help="folder of the texts"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=cache / "lorica" / "tiny-gpt2",
        help="folder for the model (default %(default)s); checkpoints stand beside it",
    )
    return parser.parse_args()


def make_optimizer(model: GPT2LMHeadModel, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, and neither biases nor norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def train(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.AdamW,
    state: State,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
    work: Path,
) -> bool:
    """Take steps until the budget is spent, a line each; False if it was told to stop before."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: stopped.append(got))
    model.to(options.device).train()
    losses: list[float] = []
    saved = state.seconds
    # Of this call alone: a resume may run on a faster machine, or beside other work.
    first = (state.step, state.seconds, state.processor_seconds)
    while (done := progress(state, options)) < 1 and not stopped:
        began = time.perf_counter(), time.thread_time()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(done)
        rows = batch(corpus.train, state.step, options.batch, options.seed).to(options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        state.step += 1
        state.seconds += time.perf_counter() - began[0]
        state.processor_seconds += time.thread_time() - began[1]
        report(state, losses[-1], first, options)
        if len(losses) == 10:
            state.training.append({**place(state, options), "loss": sum(losses) / len(losses)})
            losses.clear()
        if state.seconds - saved >= 60 * options.save_every:
            saved = state.seconds
            state.validation.append(validate(model, corpus, state, options, blocks=32))
            save(work, model, optimizer, state, options)
            export(model, tokenizer, options.out)
    save(work, model, optimizer, state, options)
    return not stopped


def progress(state: State, options: argparse.Namespace) -> float:
    """Share of the budget that is spent."""
    if options.steps:
        return state.step / options.steps
    return state.processor_seconds / (60 * options.minutes)


def schedule(done: float) -> float:
    """Learning rate over its peak when a share of the budget is spent."""
    return min(1.0, max(done, 1e-3) / WARMUP, (1 - done) / COOLDOWN)


def batch(stream: np.ndarray, step: int, size: int, seed: int) -> Tensor:
    """The rows of a step (size, context + 1): each pass cuts the stream at other places, in another order."""
    blocks = len(stream) // CONTEXT - 2
    steps = blocks // size
    epoch, place = divmod(step, steps)
    draw = np.random.default_rng([seed, epoch])
    shift = int(draw.integers(CONTEXT))
    starts = draw.permutation(blocks)[place * size : (place + 1) * size] * CONTEXT + shift
    return torch.stack([torch.from_numpy(stream[i : i + CONTEXT + 1].astype(np.int64)) for i in starts])


def report(state: State, loss: float, first: tuple[int, float, float], options: argparse.Namespace) -> None:
    """A line a step."""
    steps, seconds = state.step - first[0], state.seconds - first[1]
    speed = steps * options.batch * CONTEXT / seconds
    left = (
        (options.steps - state.step) * seconds / steps
        if options.steps
        else (60 * options.minutes - state.processor_seconds)
        * seconds
        / max(state.processor_seconds - first[2], 1e-9)
    )
    total = f"/{options.steps}" if options.steps else ""
    print(
        f"step {state.step}{total}  loss {loss:.3f}  {speed:,.0f} tokens/s  ETA {duration(max(left, 0))}",
        flush=True,
    )


def place(state: State, options: argparse.Namespace) -> dict[str, float]:
    """Where on the curve a run is."""
    return {
        "step": state.step,
        "tokens": state.step * options.batch * CONTEXT,
        "seconds": round(state.seconds, 1),
    }


@torch.no_grad()
def validate(
    model: GPT2LMHeadModel,
    corpus: Corpus,
    state: State,
    options: argparse.Namespace,
    *,
    blocks: int | None,
) -> dict[str, Any]:
    """Mean loss a token of each source, over `blocks` of its blocks spread evenly, or over all (None)."""
    model.eval()
    found: dict[str, float] = {}
    for source, stream in corpus.validation.items():
        starts = np.arange(0, len(stream) - CONTEXT - 1, CONTEXT)
        if blocks is not None:
            starts = starts[:: max(1, len(starts) // blocks)][:blocks]
        total = 0.0
        for start in starts:
            row = torch.from_numpy(stream[start : start + CONTEXT + 1].astype(np.int64)).to(options.device)
            total += float(F.cross_entropy(model(row[None, :-1]).logits[0].float(), row[1:]))
        found[source] = total / len(starts)
    model.train()
    shown = "  ".join(f"{source} {math.exp(loss):.1f}" for source, loss in found.items())
    print(f"validation perplexity: {shown}", flush=True)
    return {**place(state, options), "whole": blocks is None, "loss": found}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint was made under: a run goes on under the same, but for its budget."""
    return {"batch": options.batch, "seed": options.seed, "bf16": options.bf16}


def save(
    work: Path,
    model: GPT2LMHeadModel,
    optimizer: torch.optim.AdamW,
    state: State,
    options: argparse.Namespace,
) -> None:
    """Write a checkpoint whole or not at all."""
    held = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": dataclasses.asdict(state),
        "settings": settings(options),
    }
    replace_files(work, {"checkpoint.pt": lambda path: torch.save(held, path)})


def resume(
    work: Path, model: GPT2LMHeadModel, optimizer: torch.optim.AdamW, options: argparse.Namespace
) -> State:
    """Take up the last checkpoint, if there is one."""
    path = work / "checkpoint.pt"
    if not path.is_file():
        return State()
    held = torch.load(path, map_location=options.device, weights_only=True)
    if held["settings"] != settings(options):
        raise SystemExit(
            f"{path} was made under {held['settings']}, not {settings(options)}; go on under those, or "
            "choose another --out"
        )
    model.load_state_dict(held["model"])
    model.to(options.device)
    optimizer.load_state_dict(held["optimizer"])
    state = State(**held["state"])
    print(f"going on from step {state.step}, after {duration(state.seconds)}")
    return state


def export(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder; a reader finds an old one or the new one."""
    with tempfile.TemporaryDirectory() as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        names = sorted(path.name for path in Path(stage).iterdir())
        names.append(names.pop(names.index("config.json")))  # the last one there: without it nothing loads
        replace_files(out, {name: partial(copy, Path(stage) / name) for name in names})


def copy(source: Path, target: Path) -> None:
    """Write a file's content to another."""
    target.write_bytes(source.read_bytes())


def publish(model: GPT2LMHeadModel, corpus: Corpus, state: State, options: argparse.Namespace) -> None:
    """Write the curve and what it came to."""
    if state.step * options.batch * CONTEXT < TRIAL:
        print(f"not written: fewer than {TRIAL:,} tokens are a trial")
        return
    losses = state.validation[-1]["loss"]
    tokens, parameters = state.step * options.batch * CONTEXT, sum(p.numel() for p in model.parameters())
    plot(state)
    harness.publish(
        "pretrain_tiny_gpt2",
        title="A small decoder, pretrained",
        claim=(
            f"{parameters / 1e6:.1f} million parameters after {tokens / 1e6:.1f} million tokens "
            f"({tokens / len(corpus.train):.2f} passes) in {state.seconds / 60:.0f} minutes, "
            f"{state.processor_seconds / 60:.0f} of processor time: enough to compare ways of adapting a "
            f"decoder, not more. ![loss](results/{PLOT.name})"
        ),
        tables=[
            {
                "caption": "All validation text.",
                "columns": ["", "perplexity a token", "bits a byte"],
                "rows": [
                    [
                        source,
                        f"{math.exp(loss):.2f}",
                        f"{loss / math.log(2) / corpus.bytes_a_token[source]:.3f}",
                    ]
                    for source, loss in losses.items()
                ],
            }
        ],
        data={
            "tokens": tokens,
            "seconds": round(state.seconds, 1),
            "processor_seconds": round(state.processor_seconds, 1),
            "training": state.training,
            "validation": state.validation,
        },
        settings={
            **SHAPE,
            "context": CONTEXT,
            "vocabulary": VOCABULARY,
            "tokens a step": options.batch * CONTEXT,
            "peak learning rate": options.learning_rate,
            "bf16": options.bf16,
            "seed": options.seed,
        },
        device=options.device,
    )


def plot(state: State) -> None:
    """Draw the loss over tokens, of training and of each source's validation text."""
    figure = require("matplotlib.figure", extra="study").Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    entries = [entry for entry in state.training if entry["tokens"] > 0]
    panel.plot([e["tokens"] / 1e6 for e in entries], [e["loss"] for e in entries], lw=0.7, label="training")
    on_the_way = [entry for entry in state.validation if not entry["whole"]]  # of the same blocks
    for source in SOURCES:
        panel.plot(
            [e["tokens"] / 1e6 for e in on_the_way],
            [e["loss"][source] for e in on_the_way],
            ".-",
            label=f"validation, {source}",
        )
    panel.set_xlabel("million tokens")
    panel.set_ylabel("loss a token, nats")
    panel.set_ylim(top=7.5)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    temporary = PLOT.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(PLOT)


if __name__ == "__main__":
    main()
