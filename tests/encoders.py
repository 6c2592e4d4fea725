"""A small encoder and adapters for it, each with another head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from train import tiny
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import lorica

LABELS = {"two": ["no", "yes"], "three": ["a", "b", "c"], "score": ["score"], "tags": ["O", "B-X", "I-X"]}
TEXTS = ("lovely film", "awful story voice", "great", "grim cold plot song cast light fine warm")


def classifier(model: Path, labels: Sequence[str], *, tags: bool = False) -> Any:
    """A model with a head of that many outputs."""
    kind = AutoModelForTokenClassification if tags else AutoModelForSequenceClassification
    names = dict(enumerate(labels))
    return kind.from_pretrained(model, num_labels=len(names), id2label=names).eval()


def adapter(
    model: Path, folder: Path, labels: Sequence[str], *, tags: bool = False, seed: int = 0, r: int = 4
) -> Any:
    """Save an adapter with a head; gives the model with it."""
    torch.manual_seed(seed)
    made = classifier(model, labels, tags=tags)
    task = "TOKEN_CLS" if tags else "SEQ_CLS"
    lorica.adapt(made, lorica.LoraConfig(r=r, target_modules=["query", "value"], task_type=task), seed=seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    lorica.save(made, folder)
    return made.eval()


def write_encoder(folder: Path) -> dict[str, Any]:
    """``model`` and ``adapters`` in a folder; gives each adapter's name and the model with it alone."""
    model = tiny.write_model(folder / "model")
    found = {
        name: adapter(model, folder / "adapters" / name, labels, tags=name == "tags", seed=seed)
        for seed, (name, labels) in enumerate(LABELS.items())
    }
    vectors = AutoModelForSequenceClassification.from_pretrained(model).base_model
    lorica.adapt(vectors, lorica.LoraConfig(r=2, target_modules=["key"]), seed=5)
    with torch.no_grad():
        for parameter in vectors.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    lorica.save(vectors, folder / "adapters" / "vectors")
    return {**found, "vectors": vectors.eval()}


@torch.no_grad()
def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """What a model says of one row alone."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0]
