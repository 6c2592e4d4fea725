"""`prepare_model_for_kbit_training`, beside PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packing import NEEDED, quantized
from tiny import transformer
from torch import nn

import lorica
from lorica.errors import StateError
from lorica.peft import prepare_model_for_kbit_training

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def packed(kind: str = "nf4") -> Any:
    """A small Llama in bfloat16 whose projections are packed, as transformers would load it."""
    model = transformer("llama", dtype=torch.bfloat16)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, quantized(child, kind))
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def outline(model: nn.Module) -> dict[str, Any]:
    return {name: (p.dtype, p.requires_grad, p.shape) for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")
def test_does_what_pefts_does() -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")
    ours, theirs = packed(), packed()
    assert prepare_model_for_kbit_training(ours) is ours
    peft.prepare_model_for_kbit_training(theirs)
    assert outline(ours) == outline(theirs)
    assert ours.is_gradient_checkpointing
    assert theirs.is_gradient_checkpointing


def test_what_is_packed_stays_packed_and_the_rest_is_float32() -> None:
    model = prepare_model_for_kbit_training(packed(), use_gradient_checkpointing=False)
    dtypes = {type(p).__name__: p.dtype for p in model.parameters()}
    assert dtypes == {"Params4bit": torch.uint8, "Parameter": torch.float32}
    assert not model.is_gradient_checkpointing


def test_gradients_are_those_without_checkpointing() -> None:
    pytest.importorskip("bitsandbytes", reason=NEEDED)
    gradients = []
    for kwargs in (None, {"use_reentrant": True}, False):
        model = packed()
        options = {"gradient_checkpointing_kwargs": kwargs} if kwargs is not False else {}
        prepare_model_for_kbit_training(model, kwargs is not False, **options)
        lorica.adapt(model, lorica.LoraConfig(init_lora_weights=False), seed=0)
        ids = torch.arange(12).view(2, 6)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-4, atol=1e-6)


def test_weights_that_take_no_other_dtype_keep_theirs() -> None:
    model = prepare_model_for_kbit_training(packed("ao int8"), use_gradient_checkpointing=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_a_plain_model_is_frozen_and_brought_to_float32() -> None:
    model = prepare_model_for_kbit_training(nn.Sequential(nn.Linear(2, 2, dtype=torch.float16)))
    assert outline(model) == {
        "0.weight": (torch.float32, False, torch.Size((2, 2))),
        "0.bias": (torch.float32, False, torch.Size((2,))),
    }


def test_refusals() -> None:
    model = nn.Sequential(quantized(nn.Linear(64, 64), "nf4"))
    before = copy.deepcopy(outline(model))
    with pytest.raises(StateError, match="Sequential has no gradient checkpointing"):
        prepare_model_for_kbit_training(model)
    assert outline(model) == before
    lorica.adapt(model, lorica.LoraConfig(target_modules=["0"]))
    with pytest.raises(StateError, match="carries an adapter already"):
        prepare_model_for_kbit_training(model)
