"""A merge made final: the merged weights stay, W0 and the adapters are let go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny import Toy, outputs, shake, transformer

import lorica
from lorica import LoraConfig
from lorica.errors import StateError


def test_the_model_is_a_plain_one_with_the_merged_weights() -> None:
    model = transformer("bert-classifier")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    W0 = weakref.ref(model.bert.encoder.layer[0].attention.self.query.weight)
    shake(lorica.adapt(model, LoraConfig(task_type="SEQ_CLS", bias="lora_only")))
    lorica.attach(model, lorica.extract(model), "other")
    A = weakref.ref(model.bert.encoder.layer[0].attention.self.query.lora_A["default"].weight)
    lorica.merge(model, "default")
    merged = outputs(model)
    assert lorica.finalize(model) is model
    assert torch.equal(outputs(model), merged)
    assert ([type(m) for m in model.modules()], list(model.state_dict())) == (classes, keys)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert not lorica.adapters(model)
    gc.collect()
    assert W0() is None
    assert A() is None
    shake(lorica.adapt(model, LoraConfig(target_modules=["query"])))  # and it can be adapted again
    assert not torch.equal(outputs(model), merged)


def test_only_what_is_merged_can_be_made_final() -> None:
    with pytest.raises(StateError, match="carries no adapter"):
        lorica.finalize(Toy())
    model = lorica.adapt(Toy(), LoraConfig(target_modules=["up"]))
    with pytest.raises(StateError, match="so there is nothing to make final; call"):
        lorica.finalize(model)
    lorica.merge(model)
    lorica.finalize(model)
    with pytest.raises(StateError, match="carries no adapter"):
        lorica.restore(model)
