"""Attention on a CPU, request by request: each token looks at its own request's keys alone.

    packed row   a a a  b  c        transformers' own: every token against every key, and a mask
    keys         A A A  B B B  C C  here: a·A, b·B, c·C

With n requests the masked product is n times the work. Outside a batch this is `sdpa`, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "lorica_by_request"

Span = tuple[int, int]
"""Tokens of a request in the batch, and keys that they look at, its own among them."""

_ENGINES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def take(model: Any) -> bool:
    """Have a model's attention go by request, for one engine more; false where it is not torch's own."""
    if model.config._attn_implementation not in ("sdpa", NAME):
        return False
    _ENGINES[model] = _ENGINES.get(model, 0) + 1
    model.set_attn_implementation(NAME)
    return True


def give_back(model: Any) -> None:
    """One engine less; without any the model's attention is torch's own again."""
    _ENGINES[model] -= 1
    if not _ENGINES[model]:
        model.set_attn_implementation("sdpa")


def by_request(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: (1, heads, tokens, width) → (1, tokens, heads, width).

    Args:
        module: the attention, which knows its place among the layers.
        query: of the packed row.
        key: of the same tokens; the cache has the others'.
        value: likewise.
        attention_mask: of a pass outside a batch.
        scaling: of the products.
        cache: of the batch, with `spans`; None outside one.
        **kwargs: of the batch.
    """
    spans: Sequence[Span] | None = getattr(cache, "spans", None)
    if spans is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, cache=cache, **kwargs
        )
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    out = query.new_empty(1, query.shape[2], heads, value.shape[-1])
    at = start = 0
    for tokens, keys in spans:
        q = query[:, :, at : at + tokens]
        k, v = key[:, :, start : start + keys], value[:, :, start : start + keys]
        if tokens == 1:  # the heads that share keys are as good as so many queries of them
            y = attend(q.reshape(1, -1, groups, q.shape[-1]), k, v, scale=scaling).reshape(1, heads, 1, -1)
        else:
            seen = None
            if tokens < keys:
                seen = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(keys - tokens)
            y = attend(q, k, v, seen, is_causal=seen is None, scale=scaling, enable_gqa=groups > 1)
        out[:, at : at + tokens] = y.transpose(1, 2)
        at, start = at + tokens, start + keys
    return out, None


AttentionInterface.register(NAME, by_request)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
