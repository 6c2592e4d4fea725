"""The models that the benchmarks run on, and the three ways of adapting them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import loralib
import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import lorica
from lorica.train import embedded

disable_progress_bar()
set_verbosity_error()

QUERY_VALUE = ["query", "value"]
ALL_LINEAR = ["query", "key", "value", "dense"]
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def minilm() -> BertModel:
    """The pretrained 6-layer, 384-wide encoder of the `demo` extra, with its own dropout off."""
    return BertModel.from_pretrained(embedded.model_directory(), add_pooling_layer=False, **NO_DROPOUT)


def bert_base() -> BertModel:
    """A BERT-base-shaped encoder, 12 layers of width 768, with random weights."""
    torch.manual_seed(0)
    return BertModel(BertConfig(**NO_DROPOUT), add_pooling_layer=False)


MODELS: dict[str, Callable[[], BertModel]] = {"MiniLM (6×384)": minilm, "BERT-base shape (12×768)": bert_base}


def tokens(model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
    """A batch of random token ids, (rows, length), without padding."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 30_000, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_lorica(
    model: nn.Module, targets: list[str], *, r: int = 8, dropout: float = 0.0, dora: bool = False
) -> nn.Module:
    """Adapted by lorica, in place."""
    config = lorica.LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=targets, use_dora=dora
    )
    return lorica.adapt(model, config, seed=0)


def with_peft(
    model: nn.Module, targets: list[str], *, r: int = 8, dropout: float = 0.0, dora: bool = False
) -> nn.Module:
    """Adapted by PEFT."""
    config = peft.LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=targets, use_dora=dora
    )
    return cast("nn.Module", peft.get_peft_model(cast("Any", model), config))


def with_loralib(model: nn.Module, targets: list[str], *, r: int = 8, dropout: float = 0.0) -> nn.Module:
    """Adapted by loralib: each layer replaced by hand, as its users do."""
    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, nn.Linear) and leaf in targets:
            shape = module.in_features, module.out_features
            layer = loralib.Linear(
                *shape,
                r=r,
                lora_alpha=2 * r,
                lora_dropout=dropout,
                merge_weights=False,
                bias=getattr(module, "bias", None) is not None,
            )
            layer.load_state_dict(module.state_dict(), strict=False)
            setattr(model.get_submodule(parent), leaf, layer.to(module.weight.device))
    loralib.mark_only_lora_as_trainable(model)
    return model


LORALIB = "loralib"
PEERS: dict[str, Callable[..., nn.Module]] = {
    "PEFT": with_peft,
    LORALIB: with_loralib,
    "lorica": with_lorica,
}
