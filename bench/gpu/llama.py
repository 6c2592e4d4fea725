"""The decoder that the GPU checks run on, its rows, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000


def decoder(device: torch.device, dtype: torch.dtype, *, small: bool) -> Any:
    """A Llama-shaped decoder with random weights: 1.1 billion, or a few thousand."""
    torch.manual_seed(0)
    sizes = (64, 2, 2, 128) if small else (2048, 22, 16, 5632)
    width, blocks, heads, inner = sizes
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def rows_of(model: nn.Module, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random tokens, (rows, length), which are their own targets."""
    device = next(model.parameters()).device
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids}


def step_of(model: Any, batch: dict[str, Tensor] | None = None) -> Callable[[], Tensor]:
    """A training step; it returns its loss."""
    batch = rows_of(model, 4, 256) if batch is None else batch
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if trained else None

    def step() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step
