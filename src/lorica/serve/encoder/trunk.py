"""The trunk with adapters on it: an adapter a row in one pass, then each adapter's own head.

All of it runs in one thread, the model's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.adapter import Adapter
from lorica.errors import LoricaError
from lorica.model import active, adapters, attach, detach, disabled, mixed
from lorica.serve.encoder.base import Base, Pooling
from lorica.serve.encoder.heads import Head
from lorica.serve.encoder.rows import Row


@dataclass(eq=False)
class Mount:
    """An adapter's update on the trunk: the engine notes it in the store as its slot.

    Args:
        name: that it has on the model; None where it has nothing for the trunk.
        alone: whether it can share no batch.
    """

    name: str | None
    alone: bool


class Trunk:
    """A base that adapters are put on and taken off.

    Args:
        base: the model.
    """

    def __init__(self, base: Base) -> None:
        """Begin to count names."""
        self._base, self._names = base, itertools.count()

    def put(self, trunk: Adapter | None) -> Mount:
        """Put an adapter's update on the model; None is a head alone.

        Raises:
            LoricaError: it does not fit; the model is as it was.
        """
        if trunk is None:
            return Mount(None, alone=False)
        model, name = self._base.model, f"a{next(self._names)}"
        attach(model, trunk, name)
        disabled(model)
        try:
            with mixed(model, [name, None]):
                return Mount(name, alone=False)
        except LoricaError:  # its method is for a whole batch
            return Mount(name, alone=True)

    def off(self, mount: Mount) -> None:
        """Take it off again."""
        if mount.name is not None:
            detach(self._base.model, mount.name)

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[Row], mounts: Sequence[Mount | None], heads: Sequence[Head | None]
    ) -> list[np.ndarray]:
        """The answers to a batch of rows.

        Args:
            rows: the rows.
            mounts: the adapter of each; None is the base.
            heads: whose outputs are wanted of each; None: its vector is.
        """
        base = self._base
        types = "token_type_ids" in base.tokenizer.model_input_names
        inputs = _padded(rows, base.config.pad_token_id or 0, types=types)
        with self._choice(mounts):
            said = base.model(**inputs)
        hidden, pooled = said.last_hidden_state, getattr(said, "pooler_output", None)
        answers: list[np.ndarray] = [np.empty(0)] * len(rows)
        for head in dict.fromkeys(heads):
            places = [i for i, own in enumerate(heads) if own is head]
            index = torch.tensor(places)
            own = {name: tensor[index] for name, tensor in inputs.items()}
            if head is None:
                outputs = _vectors(hidden[index], own["attention_mask"], base.pooling, base.normalized)
            else:
                outputs = head.outputs(hidden[index], None if pooled is None else pooled[index], own)
            for place, output in zip(places, outputs.float(), strict=True):
                tags = head is not None and head.kind == "tags"
                answers[place] = (output[: len(rows[place])] if tags else output).numpy()
        return answers

    def _choice(self, mounts: Sequence[Mount | None]) -> Any:
        """The adapter of each row."""
        model, first = self._base.model, mounts[0]
        names = [None if mount is None else mount.name for mount in mounts]
        if not adapters(model):
            return contextlib.nullcontext()
        if not any(names):
            return disabled(model)
        if first is not None and first.alone and first.name is not None:
            return active(model, first.name)
        return mixed(model, names)


def _padded(rows: Sequence[Row], pad: int, *, types: bool) -> dict[str, Tensor]:
    """Rows as a batch, filled up on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row.ids + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    if types:
        kinds = [(row.types or [0] * len(row)) + [0] * (longest - len(row)) for row in rows]
        batch["token_type_ids"] = torch.tensor(kinds)
    return batch


def _vectors(hidden: Tensor, mask: Tensor, pooling: Pooling, normalized: bool) -> Tensor:
    """A vector for each row (rows, width), of its tokens' (rows, tokens, width)."""
    if pooling == "cls":
        pooled = hidden[:, 0]
    elif pooling == "last":
        pooled = hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
    return torch.nn.functional.normalize(pooled, dim=-1) if normalized else pooled
