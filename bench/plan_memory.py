"""What `lorica plan` says of memory, against what training takes: two models, three ways of training.

Each run has a process of its own, once for what torch's allocator gave out and once for what Linux held
resident; both are counted from before the model was made to the end of the second step, when the optimizer's
state is there too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import harness
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import lorica
from lorica import study

BERT = {"model_type": "bert"}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}
MODELS: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "BERT-base, classes": (BERT, "SEQ_CLS", 16, 128),
    "Llama, 12 × 512": (LLAMA, "CAUSAL_LM", 8, 256),
}
METHODS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"method": "full"},
    "LoRA": {"method": "lora"},
    "LoRA, checkpointing": {"method": "lora", "checkpointing": True},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One run, in bytes."""

    model: str
    method: str
    planned: int
    allocated: int
    resident: int

    @property
    def off(self) -> float:
        """The plan's relative error, against what torch gave out."""
        return self.planned / self.allocated - 1

    @property
    def kept(self) -> float:
        """What was resident beyond that, relatively: blocks that were freed and not given back."""
        return self.resident / self.allocated - 1


def main() -> None:
    """Run all six, and publish."""
    options = harness.options(__doc__)
    if options.device != "cpu" or not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this benchmark counts memory as Linux does, on the CPU")
    rows = []
    for model in MODELS:
        for method in METHODS:
            row = Row(
                model,
                method,
                planned(model, method),
                harness.apart(allocated, model, method),
                harness.apart(resident, model, method),
            )
            print(f"{model}, {method}: {', '.join(cells(row))}", flush=True)
            rows.append(row)
    worst = max(rows, key=lambda row: abs(row.off))
    harness.publish(
        "plan_memory",
        title="Memory: planned and measured",
        claim=(
            f"The plan of {len(rows)} runs differs by at most {abs(worst.off):.0%} from what torch gave out "
            f"at the fullest moment ({worst.model}, {worst.method}). Linux held "
            f"{min(row.kept for row in rows):.0%} to {max(row.kept for row in rows):.0%} more: libraries' "
            "work space, and blocks that the C library keeps after they are freed."
        ),
        tables=[table(rows)],
        data=[dataclasses.asdict(row) for row in rows],
        settings={"steps": 2, "optimizer": "AdamW", "r": config("BERT-base, classes").r},
        device=options.device,
    )


def config(model: str) -> lorica.LoraConfig:
    """What LoRA trains."""
    return lorica.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=MODELS[model][1])


def planned(model: str, method: str) -> int:
    """What the plan says."""
    fields, _, batch, length = MODELS[model]
    return study.plan(fields, config(model), batch=batch, length=length, **METHODS[method]).memory


def train(model: str, method: str) -> None:
    """Two steps of training, from a model made anew."""
    fields, task, batch, length = MODELS[model]
    made = AutoConfig.for_model(**fields)
    kind: Any = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    network = kind.from_config(made).train()
    if METHODS[method]["method"] == "lora":
        lorica.adapt(network, config(model), seed=0)
    if METHODS[method].get("checkpointing"):
        network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(p for p in network.parameters() if p.requires_grad)
    ids = torch.randint(10, made.vocab_size, (batch, length))
    for _ in range(2):
        loss = network(
            input_ids=ids, labels=ids[:, 0] % 2 if task == "SEQ_CLS" else ids, use_cache=False
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss


def allocated(model: str, method: str) -> int:
    """Bytes that torch's allocator had given out at the most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train(model, method)
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    every: list[Any] = record.profiler.kineto_results.events()
    held = highest = 0
    for event in sorted((e for e in every if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def resident(model: str, method: str) -> int:
    """Bytes that came to be resident."""
    torch.ones(64, 64, requires_grad=True).mm(torch.ones(64, 64)).sum().backward()  # libraries settle in
    Path("/proc/self/clear_refs").write_text("5")
    before = harness.resident("VmRSS")
    train(model, method)
    return harness.resident("VmHWM") - before


def cells(row: Row) -> list[str]:
    """The row's figures, as the report prints them."""
    sizes = [f"{n / 2**20:,.0f} MiB" for n in (row.planned, row.allocated, row.resident)]
    return [*sizes[:2], f"{row.off:+.1%}", f"{sizes[2]} ({row.kept:+.0%})"]


def table(rows: list[Row]) -> dict[str, Any]:
    """A row a run."""
    return {
        "caption": "At the fullest moment of training, over what there was before the model.",
        "columns": ["", "planned", "given out by torch", "plan is off by", "resident"],
        "rows": [[f"{row.model}: {row.method}", *cells(row)] for row in rows],
    }


if __name__ == "__main__":
    main()
