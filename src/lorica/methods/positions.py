"""The place of virtual positions among the input's, and a model's room for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.errors import AdapterError


class Layout(NamedTuple):
    """The places of things in a running forward.

    Args:
        tokens: columns of the input's own positions (batch, tokens).
        virtual: columns of the prefix, then of the infix (batch, l_p + l_i).
        read: columns that the head reads (batch, tokens).
    """

    tokens: Tensor
    virtual: Tensor
    read: Tensor


def lay_out(mask: Tensor, labels: Tensor | None, lengths: tuple[int, int], *, causal: bool) -> Layout:
    """The places of prefix and infix: the prompt ends before the first label, or with the row.

    Args:
        mask: attention mask (batch, tokens).
        labels: of each token, -100 in the prompt (batch, tokens); of another shape they say nothing of it.
        lengths: l_p and l_i.
        causal: whether a token's answer is read from the position before it.
    """
    (rows, length), (before, behind), device = mask.shape, lengths, mask.device
    ends = length - mask.flip(1).argmax(1)
    if causal and labels is not None and labels.shape == mask.shape:
        target = labels.to(device) != -100
        ends = torch.where(target.any(1), target.int().argmax(1), ends)
    at = torch.arange(length, device=device).expand(rows, -1)
    tokens = before + at + behind * (at >= ends[:, None])
    first = torch.arange(before, device=device).expand(rows, -1)
    last = before + ends[:, None] + torch.arange(behind, device=device)
    read = torch.where(at == ends[:, None] - 1, tokens + behind, tokens) if causal else tokens
    return Layout(tokens, torch.cat([first, last], dim=1), read)


def put(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """The activations x (batch, columns, d) with those of some columns (batch, n) replaced."""
    return x.scatter(1, columns[..., None].expand(-1, -1, x.shape[-1]), values.to(x.dtype))


def is_causal(model: nn.Module) -> bool:
    """Whether its attention looks back only.

    Most architectures' attention says so itself. Of the others (BLOOM, MPT, CodeGen, XGLM), those that
    transformers has for the next word and not for a masked one do.
    """
    if any(getattr(module, "is_causal", False) for module in model.modules()):
        return True
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None or getattr(config, "is_encoder_decoder", False):
        return False
    from transformers.models.auto import modeling_auto

    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        kind not in masked or bool(getattr(config, "is_decoder", False))
    )


def first_position(model: nn.Module) -> int:
    """RoBERTa and its kin count positions from behind the padding token's."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def context(model: nn.Module) -> int | None:
    """Positions that the model has, where it has a limit."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    # XLNet's -1 says that there is no limit.
    return positions - first_position(model) if isinstance(positions, int) and positions > 0 else None


def check_room(model: nn.Module, tokens: int, lengths: tuple[int, int]) -> None:
    """Raise AdapterError where tokens, prefix and infix are more than the model has positions for."""
    positions, taken = context(model), sum(lengths)
    if positions is not None and tokens + taken > positions:
        raise AdapterError(
            f"the input has {tokens} tokens, and prefix and infix take {taken} of the model's {positions} "
            f"positions, so {positions - taken} remain; shorten the input"
        )
