"""Compression: how much of a rank-64 adapter's update its accuracy needs.

One adapter is trained on rotten_tomatoes, then cut to several kept energies and several ranks, and each cut
is scored on the test rows. The trained adapter is kept in runs/, and every scored cut is a line in
results/compress_rotten_tomatoes.jsonl, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from quality_rotten_tomatoes import rows
from torch import nn
from torch.utils.data import DataLoader

import lorica
from lorica import algebra
from lorica.train import Prepared, Recipe, TrainingConfig, fit, prepare

LINES = harness.RESULTS / "compress_rotten_tomatoes.jsonl"
CACHE = Path(__file__).resolve().parents[1] / "runs" / "compress_rotten_tomatoes"
ENERGIES = (0.999, 0.99, 0.95, 0.9, 0.8, 0.5)
RANKS = (32, 16, 8, 4, 2, 1)
TRAINING = TrainingConfig(
    epochs=1, batch_size=16, max_length=64, learning_rate=3e-4, seed=0, load_best=False, report_to=[]
)
METHOD = lorica.LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="SEQ_CLS")


@dataclasses.dataclass(frozen=True)
class Cut:
    """A compressed adapter, and what it scored.

    Args:
        asked: what was asked of `compress`.
        settings: how the adapter had been trained.
        ranks: rank of each layer.
        energy: share of the squared norm of all updates that was kept.
        worst: largest relative error of a layer's update.
        parameters: of A and B.
        right: test rows answered rightly, a share.
        answers: the class given to each test row, a digit a row.
    """

    asked: str
    settings: dict[str, Any]
    ranks: list[int]
    energy: float
    worst: float
    parameters: int
    right: float
    answers: str


def main() -> None:
    """Train, cut, score, publish."""
    options = harness.options(__doc__)
    settings = {
        "method": METHOD.to_dict(),
        "training": dataclasses.asdict(TRAINING),
        "device": options.device,
    }
    asked = ["nothing", *(f"energy {e}" for e in ENERGIES), *(f"rank {r}" for r in RANKS), "no update"]
    cuts = {cut.asked: cut for cut in done() if cut.settings == settings}
    if missing := [what for what in asked if what not in cuts]:
        prepared = prepare(Recipe(data=rows(), training=TRAINING))
        adapter = trained(prepared, settings, options.device)
        for what in missing:
            cuts[what] = cut = score(prepared, adapter, what, settings, options.device)
            harness.note(LINES, cut)
            print(f"{what}: energy {cut.energy:.4f}, {100 * cut.right:.2f} % right", flush=True)
    found = [cuts[what] for what in asked]
    harness.publish(
        "compress_rotten_tomatoes",
        title="Compressing an adapter",
        claim=claim(found),
        tables=[table(found)],
        data=[{k: v for k, v in vars(cut).items() if k not in ("settings", "answers")} for cut in found],
        settings={
            "model": "MiniLM",
            "epochs": TRAINING.epochs,
            "learning rate": TRAINING.learning_rate,
            "r": METHOD.r,
            "lora_alpha": METHOD.lora_alpha,
            "targets": METHOD.target_modules,
            "seed": TRAINING.seed,
        },
        device=options.device,
    )


def done() -> Iterator[Cut]:
    """The cuts in the file."""
    return harness.noted(LINES, Cut)


def trained(prepared: Prepared, settings: dict[str, Any], device: str) -> lorica.Adapter:
    """The adapter, from the cache if it was trained before under the same settings; the model stays plain."""
    folder, note = CACHE / device.partition(":")[0], "settings.json"
    text = json.dumps(settings, indent=1)
    if lorica.is_adapter(folder) and (folder / note).is_file() and (folder / note).read_text() == text:
        return lorica.read(folder)
    training = dataclasses.replace(TRAINING, arguments={"use_cpu": device == "cpu"})
    learn = prepared.splits["train"].features
    with tempfile.TemporaryDirectory() as output:
        model = lorica.adapt(prepared.model, METHOD, seed=TRAINING.seed)
        fit(model, prepared.task, prepared.tokenizer, learn, None, training, output, title="rank 64")
    lorica.save(model, folder)
    harness.write(folder / note, text)
    lorica.detach(model)
    return lorica.read(folder)


def score(
    prepared: Prepared, adapter: lorica.Adapter, asked: str, settings: dict[str, Any], device: str
) -> Cut:
    """Cut the adapter as asked, put it on the model, and answer the test rows."""
    how, _, value = asked.partition(" ")
    if how == "energy":
        cut, report = algebra.compress(adapter, energy=float(value))
    elif how == "rank":
        cut, report = algebra.compress(adapter, rank=int(value))
    else:
        cut = algebra.scale(adapter, 1.0 if asked == "nothing" else 0.0)
        report = algebra.error(cut, [adapter])
    model = prepared.model
    lorica.attach(model, cut)
    given, right = answers(model, prepared, device)
    lorica.detach(model)
    dropped = asked == "no update"
    return Cut(
        asked=asked,
        settings=settings,
        ranks=[0 if dropped else factors.r for factors in cut.factors.values()],
        energy=report.energy,
        worst=report.worst[1],
        parameters=0 if dropped else sum(f.A.numel() + f.B.numel() for f in cut.factors.values()),
        right=right,
        answers=given,
    )


@torch.inference_mode()
def answers(model: nn.Module, prepared: Prepared, device: str) -> tuple[str, float]:
    """The class given to each test row, and the share that is right."""
    model.eval().to(device)
    collate = prepared.task.collator(prepared.tokenizer)
    given, labels = [], []
    for batch in DataLoader(prepared.splits["test"].features, 64, collate_fn=collate):  # type: ignore[arg-type]
        labels.append(batch.pop("labels"))
        given.append(
            model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.argmax(1).cpu()
        )
    said, truth = torch.cat(given), torch.cat(labels)
    return "".join(map(str, said.tolist())), float((said == truth).double().mean())


def same(cut: Cut, other: Cut) -> float:
    """The share of test rows to which both give one answer."""
    return statistics.mean(a == b for a, b in zip(cut.answers, other.answers, strict=True))


def claim(cuts: list[Cut]) -> str:
    """What it comes to, in a sentence or two."""
    whole, *rest = cuts
    near = [cut for cut in rest if cut.right >= whole.right - 0.005]
    least = min(near, key=lambda cut: cut.parameters)
    size, kept = 100 * least.parameters / whole.parameters, 100 * least.energy
    return (
        f"An adapter of rank {METHOD.r} gets {100 * whole.right:.1f} % of the test rows right. Cut to "
        f"{size:.1f} % of its size ({least.asked}; {kept:.1f} % of the update's energy) it gets "
        f"{100 * least.right:.1f} %, and with its head and no update {100 * rest[-1].right:.1f} %. One seed; "
        "the standard error of such a figure is about 1.2 points."
    )


def table(cuts: list[Cut]) -> dict[str, Any]:
    """A row a cut."""
    whole = cuts[0]
    return {
        "caption": "Energy is the squared Frobenius norm of the update. Where an energy was asked for, each "
        "layer keeps that share of its own; where a rank was, each layer has it.",
        "columns": [
            "asked",
            "kept energy",
            "mean rank (lowest to highest)",
            "worst layer's error",
            "parameters of A and B",
            "test accuracy",
            "same answers",
        ],
        "rows": [
            [
                cut.asked,
                f"{100 * cut.energy:.2f} %",
                f"{statistics.mean(cut.ranks):.1f} ({min(cut.ranks)} to {max(cut.ranks)})",
                f"{cut.worst:.3f}",
                f"{cut.parameters:,}",
                f"{100 * cut.right:.2f} %",
                f"{100 * same(cut, whole):.2f} %",
            ]
            for cut in cuts
        ],
    }


if __name__ == "__main__":
    main()
