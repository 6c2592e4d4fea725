"""Heads on a trunk, which tell classes, tags or numbers: each adapter's own.

A head is computed by its architecture's own class, whose trunk is exchanged for a stand-in that returns what
the trunk computed already, for the rows of all adapters at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lorica.adapter import Adapter
from lorica.errors import LoricaError, listing
from lorica.model import attach, finalize
from lorica.serve.encoder.rows import Row
from lorica.serve.engine import RefusedAdapter
from lorica.train.metrics.predictions import OUTSIDE, marks_spans, spans
from lorica.train.tasks.texts import softmax

Kind = Literal["classes", "labels", "number", "tags"]
"""One class of several; any of several; a number; a class for each word."""

TASKS: Mapping[str, Kind] = {
    "sequence-classification": "classes",
    "multi-label-classification": "labels",
    "regression": "number",
    "token-classification": "tags",
}
"""Tasks of `lorica.train` that a head answers."""


def auto_class(kind: Kind) -> Any:
    """Transformers' class that makes a model with such a head."""
    return (
        transformers.AutoModelForTokenClassification
        if kind == "tags"
        else transformers.AutoModelForSequenceClassification
    )


@dataclass(frozen=True, eq=False)
class Head:
    """A head, ready to compute.

    Args:
        kind: meaning of its outputs.
        labels: names of its outputs.
        model: its class, with a stand-in for the trunk.
        stand_in: that stand-in.
        raw: whether a number is told as it is, and not brought between 0 and 1.
    """

    kind: Kind
    labels: tuple[str, ...]
    model: nn.Module
    stand_in: StandIn
    raw: bool = True

    def outputs(self, hidden: Tensor, pooled: Tensor | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (rows, labels), or (rows, tokens, labels) of tags.

        Args:
            hidden: (rows, tokens, width).
            pooled: (rows, width), where the trunk has a pooler.
            inputs: the trunk's inputs.
        """
        self.stand_in.told = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)  # type: ignore[arg-type]
        try:
            return self.model(**inputs).logits
        finally:
            self.stand_in.told = None

    def number(self, output: np.ndarray) -> float:
        """The number that an output means."""
        return float(output[0] if self.raw else _sigmoid(output)[0])

    def told(self, output: np.ndarray, row: Row) -> dict[str, Any]:
        """The answer for a row: vLLM's fields, and those of its kind."""
        names = list(self.labels)
        if self.kind == "number":
            score = self.number(output)
            return {"label": names[0], "probs": [score], "num_classes": 1, "score": score}
        if self.kind == "tags":
            return self._tags(softmax(output), row)
        odds = softmax(output) if self.kind == "classes" else _sigmoid(output)
        told = {
            "label": names[int(odds.argmax())],
            "probs": odds.tolist(),
            "num_classes": len(names),
            "labels": names,
        }
        chosen = [name for name, p in zip(names, odds, strict=True) if p >= 0.5]
        return told if self.kind == "classes" else {**told, "chosen": chosen}

    def _tags(self, odds: np.ndarray, row: Row) -> dict[str, Any]:
        """The class of each word; None for words of which no token was read."""
        labels: list[str | None] = [None] * len(row.words)
        sure: list[float | None] = [None] * len(row.words)
        for word, token in row.firsts:
            labels[word], sure[word] = self.labels[int(odds[token].argmax())], float(odds[token].max())
        told: dict[str, Any] = {"words": list(row.words), "labels": labels, "probs": sure}
        if marks_spans(self.labels):
            told["spans"] = spans([label or OUTSIDE for label in labels])
        return {**told, "num_classes": len(self.labels)}


def _sigmoid(output: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * output.astype(np.float64)))  # by tanh, which does not overflow


class StandIn(nn.Module):
    """Stands in a head's model for the trunk."""

    def __init__(self, config: Any) -> None:
        """Have nothing to tell yet."""
        super().__init__()
        self.config, self.told = config, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The trunk's outputs, computed before."""
        return self.told


def make_head(
    config: Any,
    kind: Kind,
    labels: Sequence[str],
    values: Mapping[str, Tensor],
    adapter: Adapter | None = None,
    *,
    raw: bool = True,
) -> Head:
    """Build a head.

    Args:
        config: the base's.
        kind: meaning of its outputs.
        labels: names of its outputs.
        values: parameters and buffers of the head that the base's files have, by name.
        adapter: brings others, and updates of them; None: the base's own head.
        raw: as in `Head`.

    Raises:
        RefusedAdapter: some of its parameters are nowhere, or do not fit.
    """
    names = dict(enumerate(labels))
    config = type(config).from_dict({**config.to_dict(), "id2label": names, "num_labels": len(names)})
    with torch.device("meta"):
        model: Any = auto_class(kind).from_config(config)
    stand_in = StandIn(config)
    setattr(model, model.base_model_prefix, stand_in)
    model.to_empty(device="cpu")
    given = {**values, **({} if adapter is None else adapter.extras)}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    odd = [
        f"{name} is {tuple(given[name].shape)}, where {tuple(tensor.shape)} is due"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if missing := sorted(set(own) - set(given)):
        odd.append(f"neither the adapter nor the base has values of {listing(missing)}")
    if odd:
        raise RefusedAdapter("its head does not fit: " + "; ".join(odd))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
    if adapter is not None and adapter.factors:
        try:
            attach(model, updates_alone(adapter, adapter.factors))
            finalize(model)
        except LoricaError as error:
            raise RefusedAdapter(f"its update of the head does not fit: {error}") from error
    return Head(kind, tuple(labels), model.eval().requires_grad_(False), stand_in, raw)


def updates_alone(
    adapter: Adapter, factors: Mapping[str, Any], extras: Mapping[str, Tensor] | None = None
) -> Adapter:
    """An adapter of some of another's updates, whose modules are named one by one.

    Args:
        adapter: the other.
        factors: the updates, by the paths that they are to have.
        extras: modules that it trains whole beside them.
    """
    config = adapter.lora.replace(
        target_modules=sorted(factors),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        modules_to_save=sorted({name.rpartition(".")[0] for name in extras or {}}) or None,
        task_type=None,
    )
    return Adapter(config, dict(factors), dict(extras or {}))
