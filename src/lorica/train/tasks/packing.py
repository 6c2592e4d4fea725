"""Packing: several rows in one sequence, each with its own positions, none of which attends to another.

    padded      a a a a a a a a              packed      a a a a a a a a
                b b b . . . . .                          b b b c c d d d
                c c . . . . . .              positions   0 1 2 0 1 0 1 2
                d d d . . . . .

transformers' causal models see by positions that begin anew where a row begins, and keep the rows apart.
Whether a model does so is tried out before training; see `check_packing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from lorica.errors import ConfigError
from lorica.train.tasks.base import Encoded

POSITIONS = "position_ids"

_IGNORED = -100


def bins(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Put rows into sequences, each into the fullest that has room for it, the longest rows first.

    Args:
        lengths: tokens of each row, none over the limit.
        limit: tokens of a sequence.

    Returns:
        Places of the rows of each sequence, in order; the sequences in the order of their first rows.
    """
    room: dict[int, list[int]] = {}  # tokens left → sequences
    free = 0  # bit n: there is a sequence with n tokens left
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        length = lengths[row]
        enough = free >> length
        if enough:
            left = length + (enough & -enough).bit_length() - 1
            place = room[left].pop()
            if not room[left]:
                free &= ~(1 << left)
        else:
            left, place = limit, len(found)
            found.append([])
        found[place].append(row)
        left -= length
        room.setdefault(left, []).append(place)
        free |= 1 << left
    return sorted(sorted(rows) for rows in found)


def pack(encoded: Encoded, limit: int) -> Encoded:
    """Rows of a causal language model, packed.

    Args:
        encoded: rows with ``input_ids`` and ``labels``.
        limit: tokens of a packed sequence; as many as the longest row has, or more.

    Returns:
        The same rows and targets in fewer sequences, with ``position_ids``.
    """
    rows = encoded.features
    ids, labels = rows["input_ids"], rows["labels"]
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], POSITIONS: [], "length": []}
    for places in bins(rows["length"], limit):
        parts = [ids[place] for place in places]
        columns["input_ids"].append([token for part in parts for token in part])
        # A row's first token would be predicted from the row before.
        targets = [label for place in places for label in (_IGNORED, *labels[place][1:])]
        columns["labels"].append(targets)
        columns[POSITIONS].append([position for part in parts for position in range(len(part))])
        columns["length"].append(len(targets))
    return replace(encoded, features=Dataset.from_dict(columns), rows=len(encoded))


class PackingCollator:
    """Batches of packed sequences; of rows that are not, those of another collator.

    Args:
        other: makes batches of rows that are not packed.
        pad: token that fills a sequence up.
    """

    def __init__(self, other: Any, pad: int) -> None:
        """Keep both."""
        self.other, self.pad = other, pad

    def __call__(self, features: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        """Make a batch. No mask is in it: with one, models would not look at positions."""
        if POSITIONS not in features[0]:
            return self.other(features)
        longest = max(len(each["input_ids"]) for each in features)
        # Each token of the padding is at position 0, and so a row of its own.
        fill = {"input_ids": self.pad, "labels": _IGNORED, POSITIONS: 0}
        return {
            name: torch.tensor([[*each[name], *[value] * (longest - len(each[name]))] for each in features])
            for name, value in fill.items()
        }


def check_packing(model: PreTrainedModel, sequences: int = 2) -> None:
    """Refuse a model that does not keep packed rows apart, by trying it.

    Args:
        model: the model.
        sequences: sequences in a batch: some kinds of attention see packed rows in a batch of one alone.

    Raises:
        ConfigError: what a row gives depends on the rows beside it, or on where it stands.
    """
    name, count = type(model).__name__, min(model.config.get_text_config().vocab_size, 1000)
    draw = torch.Generator().manual_seed(0)
    row, one, other = (torch.randint(count, (size,), generator=draw) for size in (5, 3, 3))
    trained = model.training
    model.eval()
    try:
        with torch.no_grad():
            beside_one, beside_other = (
                _packed_logits(model, [before, row], sequences) for before in (one, other)
            )
            alone = _packed_logits(model, [row], sequences)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} takes no packed rows ({error}); leave out training.packing") from error
    finally:
        model.train(trained)
    scale = alone.abs().max()
    if not torch.equal(beside_one, beside_other):
        raise ConfigError(
            f"{name} does not keep packed rows apart: what one gives depends on the row before it. Load it "
            "with attn_implementation sdpa or eager, take one sequence a batch, or leave out training.packing"
        )
    # The same sums in another order: what rounding may differ by, and no more.
    if (beside_one - alone).abs().max() > 100 * torch.finfo(model.dtype).eps * scale:
        raise ConfigError(
            f"{name} does not read a packed row as one that stands alone: it counts positions from the "
            "sequence's start. Leave out training.packing"
        )


def _packed_logits(model: PreTrainedModel, rows: Sequence[Tensor], sequences: int) -> Tensor:
    """The logits of the last of some packed rows, in float32; a batch has the same sequence several times."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    inputs = {"input_ids": torch.cat(list(rows)), POSITIONS: positions}
    batch = {key: value.repeat(sequences, 1).to(model.device) for key, value in inputs.items()}
    return model(**batch, use_cache=False).logits[0, -len(rows[-1]) :].float()
