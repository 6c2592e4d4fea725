"""What every method must hold: it comes, saves, loads, resumes and goes, and leaves the model as it was."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, outputs, record, shake, transformer
from torch import Tensor, nn

import lorica
from lorica.config import AdapterConfig, method_of
from lorica.errors import StateError

ARCHITECTURES = ("bert", "roberta", "distilbert", "gpt2", "llama", "t5", "vit")
Given = AdapterConfig | list[AdapterConfig]


def trained_names(model: nn.Module) -> set[str]:
    """Names of what trains, a tied parameter under each of its names."""
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def loss(model: nn.Module, name: str) -> Tensor:
    """A loss that reaches all of the model's outputs."""
    result: Any = model(**batch(name))
    output = next(result[key] for key in ("logits", "start_logits", "last_hidden_state") if key in result)
    return output.square().mean()


def check_round_trip(name: str, config: Given, folder: Path, *, exact_start: bool = True) -> None:
    """A method on an architecture: from `adapt` to `detach`, through a file and a step of training."""
    model = transformer(name)
    before, base = record(model), outputs(model, name)
    lorica.adapt(model, config, seed=0)
    if exact_start:
        assert torch.equal(outputs(model, name), base)
    trained = trained_names(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    loss(model, name).backward()
    with_gradient = {n for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    assert with_gradient
    assert with_gradient <= trained
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    assert all(torch.equal(model.get_parameter(n), value) for n, value in frozen.items())

    shake(model)
    changed = outputs(model, name)
    assert not torch.allclose(changed, base)
    with lorica.disabled(model):
        assert torch.equal(outputs(model, name), base)
    assert torch.equal(outputs(model, name), changed)
    lorica.save(model, folder)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(twin, name), changed)

    other = lorica.load(transformer(name), folder)
    assert torch.equal(outputs(other, name), changed)
    assert not trained_names(other)
    resumed = lorica.adapt(transformer(name), config, seed=5)
    lorica.load_weights(resumed, folder)
    assert torch.equal(outputs(resumed, name), changed)
    assert trained_names(resumed) == trained
    assert method_of(lorica.adapters(other)["default"]) == method_of(lorica.adapters(model)["default"])
    value = lorica.extract(model)
    assert value.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.equal(outputs(lorica.attach(transformer(name), value), name), changed)

    lorica.detach(model)
    assert record(model) == before
    assert torch.equal(outputs(model, name), base)


def check_refuses_merge(name: str, config: Given) -> None:
    """An additive method says why it cannot be merged, and the model stays as it is."""
    model = lorica.adapt(transformer(name), config, seed=0)
    shake(model)
    changed = outputs(model, name)
    with pytest.raises(StateError, match="cannot be merged"):
        lorica.merge(model)
    assert torch.equal(outputs(model, name), changed)
