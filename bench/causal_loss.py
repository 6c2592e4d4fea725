"""Loss of a language model over a vocabulary of 50,257: all logits at once, or a few tokens' at a time.

Memory is what is allocated between hidden states and gradients, counted twice: by torch's allocator, and by
the kernel, as resident pages of a fresh process. Then the gradient of a whole accumulation window.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import lorica
from lorica.train import Trainer
from lorica.train.trainer.loss import CHUNK, LinearHead, chunked_cross_entropy

VOCABULARY, TOKENS, WIDTH = 50_257, 2_048, 768
PLAIN, OWN, TORCH, TORCH_AUTO = "plain", "lorica", f"torch, chunks of {CHUNK}", "torch, its own chunks"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Setting(NamedTuple):
    """What the losses have in common."""

    name: str
    dtype: torch.dtype
    head_trains: bool


SETTINGS = (
    Setting("float32, head frozen", torch.float32, False),
    Setting("bfloat16, head frozen", torch.bfloat16, False),
    Setting("float32, head trained", torch.float32, True),
)


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As transformers does: logits, in float32, then their loss."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def own(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """lorica's, as its Trainer uses it."""
    return chunked_cross_entropy(LinearHead(weight), hidden, target)


def by_torch(**options: Any) -> Loss:
    """The chunked loss of torch itself."""
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=chosen)


LOSSES: dict[str, Loss] = {PLAIN: plain, OWN: own}
if hasattr(F, "linear_cross_entropy"):
    LOSSES[TORCH] = by_torch(batch_chunk_size=CHUNK)
    LOSSES[TORCH_AUTO] = by_torch()


def main() -> None:
    """Measure memory, agreement, time, and accumulation."""
    options = harness.options(__doc__)
    figures = {setting.name: figures_of(setting, options.device) for setting in SETTINGS}
    comparisons = [
        harness.alternate(
            setting.name,
            {name: contestant(setting, name, options.device) for name in LOSSES if name != TORCH_AUTO},
            reference=PLAIN,
            options=options,
        )
        for setting in SETTINGS
    ]
    accumulated = {name: accumulation(make) for name, make in {"Llama": llama, "GPT-2": gpt2}.items()}
    tables = [
        memory_table(figures),
        agreement_table(figures),
        harness.table(comparisons, "Time, forward and backward"),
        accumulation_table(accumulated),
    ]
    for table in tables:
        print(table["caption"], *table["rows"], sep="\n  ")
    harness.publish(
        "causal_loss",
        title="Loss without the logit matrix",
        claim=(
            f"Cross-entropy of {TOKENS:,} target tokens over {VOCABULARY:,} words, hidden states {WIDTH} "
            "wide, beside that of all logits at once; and the gradient accumulated over micro-batches beside "
            "that of one large batch."
        ),
        tables=tables,
        data={
            "figures": figures,
            "seconds": harness.seconds(comparisons),
            "accumulation": accumulated,
        },
        settings={"vocabulary": VOCABULARY, "target tokens": TOKENS, "width": WIDTH, "chunk": CHUNK},
        device=options.device,
        rounds=options.rounds,
    )


def inputs(setting: Setting, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that want a gradient, the head's weight, and the targets."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(device, setting.dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=draw) / WIDTH**0.5).to(device, setting.dtype)
    target = torch.randint(VOCABULARY, (TOKENS,), generator=draw).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(setting.head_trains), target


def contestant(setting: Setting, name: str, device: str) -> harness.Contestant:
    """One loss, forward and backward."""
    hidden, weight, target = inputs(setting, device)

    def run(_: None) -> None:
        hidden.grad = weight.grad = None
        LOSSES[name](hidden, weight, target).backward()

    return harness.Contestant(run)


def figures_of(setting: Setting, device: str) -> dict[str, dict[str, float | None]]:
    """What each loss allocates, and how far it and its gradients are from the plain ones."""
    found: dict[str, dict[str, float | None]] = {}
    expected: list[Tensor] = []
    for name in LOSSES:
        allocated, results = (on_cpu if device == "cpu" else on_gpu)(name, *inputs(setting, device))
        expected = expected or results
        distances = [_distance(a, b) for a, b in zip(results, expected, strict=True)]
        kinds = ("loss", "gradient of hidden", "gradient of weight")
        found[name] = {
            "allocated": allocated,
            "resident": resident_of(setting, name) if device == "cpu" else None,
            **dict(zip(kinds, distances, strict=False)),
        }
    return found


def on_cpu(name: str, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes at the height of forward and backward, by the count of torch's allocator; loss and gradients."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss = LOSSES[name](hidden, weight, target)
        loss.backward()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    every: list[Any] = record.profiler.kineto_results.events()
    held = highest = 0
    for event in sorted((e for e in every if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest, [loss.detach(), *(x.grad for x in (hidden, weight) if x.grad is not None)]


def on_gpu(name: str, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[int, list[Tensor]]:
    """The same on a GPU."""
    torch.cuda.reset_peak_memory_stats(hidden.device)
    before = torch.cuda.memory_allocated(hidden.device)
    loss = LOSSES[name](hidden, weight, target)
    loss.backward()
    highest = torch.cuda.max_memory_allocated(hidden.device) - before
    return highest, [loss.detach(), *(x.grad for x in (hidden, weight) if x.grad is not None)]


def resident_of(setting: Setting, name: str) -> int | None:
    """Bytes of resident memory at the height of forward and backward, in a fresh process; None off Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    return harness.apart(_resident, SETTINGS.index(setting), name)


def _resident(setting: int, name: str) -> int:
    hidden, weight, target = inputs(SETTINGS[setting], "cpu")
    # A first step of few tokens, so that libraries and their work space are there already.
    LOSSES[name](hidden[:8], weight, target[:8]).backward()
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = harness.resident("VmRSS")
    LOSSES[name](hidden, weight, target).backward()
    return harness.resident("VmHWM") - before


SMALL: dict[str, Any] = {"vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> LlamaForCausalLM:
    """A small Llama."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**SMALL, **shape))


def gpt2() -> GPT2LMHeadModel:
    """A small GPT-2, without dropout, which would draw other masks for other batches."""
    shape: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**SMALL, **shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def accumulation(make: Callable[[], Any]) -> dict[str, float]:
    """How far the adapter's gradient of four micro-batches is from that of one batch, by trainer and path."""
    one_batch = _gradient(make, 32, 1, chunked_loss=False)
    return {
        f"{'chunked' if chunked else 'all logits'}, {batches} of {32 // batches} rows": _distance(
            _gradient(make, 32 // batches, batches, chunked_loss=chunked), one_batch
        )
        for chunked in (False, True)
        for batches in (4, 32)
    }


def _gradient(make: Callable[[], Any], rows: int, batches: int, *, chunked_loss: bool) -> Tensor:
    torch.manual_seed(0)
    model = lorica.adapt(make(), lorica.LoraConfig(r=8, target_modules="all-linear"), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.02)
    found: list[Tensor] = []

    class Read(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.extend(p.grad.flatten().clone() for p in trained if p.grad is not None)

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=batches,
            max_steps=1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(
            model=model,
            args=args,
            train_dataset=_rows(),
            data_collator=default_data_collator,
            callbacks=[Read()],
            chunked_loss=chunked_loss,
        ).train()
    return torch.cat(found)


def _rows() -> Any:
    """Rows of 37 tokens, of which the first half count few and the second half all.

    With 48, micro-batches of 8 rows have 384 tokens, the block in which a processor's library may add up the
    one large batch too, and the difference is 0 by that chance.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (32, 37), generator=draw)
    labels = ids.clone()
    labels[:16, :-2] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def memory_table(figures: dict[str, dict[str, dict[str, float | None]]]) -> dict[str, Any]:
    """Allocated and resident bytes of every loss, and their ratio to the plain one's."""

    def cell(found: dict[str, float | None], reference: dict[str, float | None], kind: str) -> str:
        value, base = found[kind], reference[kind]
        if value is None or base is None:
            return ""
        return f"{value / 2**20:,.0f} MiB" + ("" if found is reference else f" ({value / base:.2f}×)")

    return {
        "caption": "Peak memory, forward and backward, over what was there before",
        "columns": ["", *LOSSES],
        "rows": [
            [f"{setting}: {kind}", *(cell(row[name], row[PLAIN], kind) for name in LOSSES)]
            for setting, row in figures.items()
            for kind in ("allocated", "resident")
            if row[PLAIN][kind] is not None
        ],
    }


def agreement_table(figures: dict[str, dict[str, dict[str, float | None]]]) -> dict[str, Any]:
    """Relative distance of every loss and gradient from the plain one's."""
    rows = []
    for setting, row in figures.items():
        for kind in ("loss", "gradient of hidden", "gradient of weight"):
            values = [row[name][kind] for name in LOSSES if name != PLAIN and kind in row[name]]
            if values:
                rows.append([f"{setting}: {kind}", *(f"{value:.1e}" for value in values)])
    return {
        "caption": "Relative distance from the plain loss and its gradients",
        "columns": ["", *(name for name in LOSSES if name != PLAIN)],
        "rows": rows,
    }


def accumulation_table(accumulated: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Relative distance of accumulated gradients from those of one batch."""
    kinds = next(iter(accumulated.values()))
    return {
        "caption": "Relative distance of the accumulated gradient from that of one batch of 32 rows",
        "columns": ["", *kinds],
        "rows": [[name, *(f"{row[kind]:.1e}" for kind in kinds)] for name, row in accumulated.items()],
    }


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


if __name__ == "__main__":
    main()
