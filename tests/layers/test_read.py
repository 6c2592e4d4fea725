"""Layers whose weight is read past their forward: by the module around them, or by a forward of their own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import adapted, assert_as_folded
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from lorica.check import layer_class
from lorica.errors import StateError, TargetError
from lorica.layers import ReadWeight, Uncalled
from lorica.layers.plugins.reading import Reading, reading_of


class Reader(nn.Module):
    """A part of each kind: called, read, both, and only asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both, self.asked = (nn.Linear(4, 4) for _ in range(4))
        self.table, self.kernel = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x) @ self.read.weight.t() + self.read.bias
        x = self.both(x) + F.linear(x, self.both.weight.to(self.asked.weight.dtype))
        if isinstance(self.asked.weight, Tensor) and self.called.weight is not None:  # pyright: ignore[reportUnnecessaryComparison]
            x = self.asked(x)
        x = x + self.table.weight[: x.shape[1]]
        return self.asked(x) + F.conv1d(x.mT, self.kernel.weight, self.kernel.bias, padding=1).mT


class Routing(nn.Linear):
    """As the routers of some mixtures of experts: a linear layer that returns its choices too."""

    def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = super().forward(x)
        return logits.topk(2).values.softmax(-1), logits


class Causal(nn.Conv1d):
    """A convolution that pads its input itself."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(F.pad(x, (2, 0)))


class Own(nn.Module):
    """Layers with a forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.causal = Routing(4, 6), Causal(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, logits = self.route(x)
        return self.causal(x.mT).mT * weights.sum(-1, keepdim=True) + weights[..., :1] + logits[..., :4]


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def test_the_code_of_a_module_tells_what_it_reads() -> None:
    reader = Reader()
    found = {name: reading_of(child, reader) for name, child in reader.named_children()}
    assert found == {
        "called": Reading(read=False, called=True),
        "read": Reading(read=True, called=False),
        "both": Reading(read=True, called=True),
        "asked": Reading(read=False, called=True),
        "table": Reading(read=True, called=False),
        "kernel": Reading(read=True, called=False),
    }


def test_what_has_no_source_is_taken_as_called() -> None:
    namespace: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.part.weight", namespace)
    made = namespace["Made"]()
    made.part = nn.Linear(4, 4)
    assert reading_of(made.part, made) == Reading(read=False, called=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["read", "both", "called", "table", "kernel"])
def test_a_layer_that_is_read_acts_as_if_merged(name: str, dora: bool, training: bool) -> None:
    model, before = adapted(Reader().train(training), name, use_dora=dora)
    if not dora:
        assert_as_folded(model, before, X)
    out = model(X)
    out.square().sum().backward()
    assert all(factor.grad.any() for factor in getattr(model, name).factor_parameters("default"))
    lorica.merge(model)
    torch.testing.assert_close(model(X), out, rtol=1e-4, atol=1e-5)
    lorica.restore(model)
    lorica.detach(model)
    assert torch.equal(model(X), before(X))


def test_several_adapters_add_up() -> None:
    model, before = adapted(Reader(), "read", "both", "table", "kernel")
    adapted(model, "read", "both", "table", "kernel", name="other")
    lorica.active(model, ["default", "other"])
    assert_as_folded(model, before, X, names=("default", "other"))


@pytest.mark.parametrize("name", ["route", "causal"])
def test_a_forward_of_its_own_reads_the_folded_weight(name: str) -> None:
    model, before = adapted(Own(), name)
    out = assert_as_folded(model, before, X)
    lorica.merge(model)
    torch.testing.assert_close(model(X), out, rtol=1e-4, atol=1e-5)


def test_what_a_weight_cannot_hold_is_refused() -> None:
    with pytest.raises(TargetError, match=r"read: .*lora_dropout=0"):
        lorica.adapt(Reader(), lorica.LoraConfig(target_modules=["read"], lora_dropout=0.1))
    with pytest.raises(TargetError, match=r"read: .*lora_bias=False"):
        lorica.adapt(Reader(), lorica.LoraConfig(target_modules=["read"], lora_bias=True))
    with pytest.raises(TargetError, match=r"read: .*is read without being called"):
        lorica.adapt(Reader(), lorica.LoraConfig(target_modules=["read"], init_lora_weights="eva"))
    model, _ = adapted(Reader(), "both", lora_dropout=0.1)
    model.eval()(X)
    with pytest.raises(StateError, match=r"Linear \(4, 4\).*lora_dropout=0"):
        model.train()(X)
    model, _ = adapted(Reader(), "both", lora_bias=True)
    with pytest.raises(StateError, match="lora_bias=False"):
        model(X)
    model, _ = adapted(Reader(), "both")
    with lorica.mixed(model, ["default", None]), pytest.raises(StateError, match="all rows"):
        model(X)
    model, _ = adapted(Reader(), "read")
    with pytest.raises(StateError, match="read past its layer"):
        lorica.mixed(model, ["default", None])


def test_a_grouped_convolution_that_is_read_is_refused() -> None:
    reader = Reader()
    reader.kernel = nn.Conv1d(4, 4, 3, padding=1, groups=4)
    with pytest.raises(TargetError, match=r"kernel: .*4 groups"):
        lorica.adapt(reader, lorica.LoraConfig(r=4, target_modules=["kernel"]))


def test_such_layers_are_copied_and_pickled() -> None:
    model, _ = adapted(Reader(), "read", "both", "table", "kernel")
    assert all(isinstance(getattr(model, name), ReadWeight) for name in ("read", "both", "table", "kernel"))
    assert issubclass(layer_class(model.read, model), Uncalled)  # pyright: ignore[reportArgumentType]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
