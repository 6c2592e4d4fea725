"""`lora_bias`: the update ``scale·(B·A·x + b)``, against that formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import delta
from tiny import record, transformer
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from lorica.errors import AdapterError, ConfigError, StateError, TargetError
from lorica.layers import LoraLayer


class Opaque(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


BASES: dict[str, Any] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "without-bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "opaque": (lambda: Opaque(5, 4), (3, 5)),
    "conv1": (lambda: nn.Conv1d(2, 3, 3), (2, 2, 7)),
    "conv2": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 5)),
    "conv3": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
}


def make(kind: str, *names: str) -> tuple[Any, Any, Tensor]:
    """A model of one layer with these adapters, the layer before that, and an input."""
    layer, shape = BASES[kind]
    base = layer()
    model = nn.Sequential(copy.deepcopy(base))
    for i, name in enumerate(names):
        lorica.adapt(model, config(), name, seed=i)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model, base, torch.randn(shape)


def config(**more: Any) -> lorica.LoraConfig:
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["0"], "lora_bias": True}
    return lorica.LoraConfig(**fields | more)


def expected(model: nn.Sequential, base: nn.Module, x: Tensor, *names: str) -> Tensor:
    """The base with W0 + Σ scale·B·A and b0 + Σ scale·b as its weight and bias; differentiable."""
    layer = model[0]
    assert isinstance(layer, LoraLayer)
    weight = sum((delta(layer, name) for name in names), start=layer.base_weight)
    shifts: list[Tensor] = [layer.scaling[name] * layer.lora_B[name].bias for name in names]  # type: ignore
    own = layer._parameters["bias"]
    bias = torch.stack(shifts if own is None else [own, *shifts]).sum(0)
    parts = {"weight": weight, "bias": bias}
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    return torch.func.functional_call(base, parts, x)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_outputs_and_gradients(kind: str, names: tuple[str, ...]) -> None:
    model, base, x = make(kind, *names)
    lorica.active(model, names)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3 * len(names)
    y, y0 = model(x), expected(model, base, x, *names)
    torch.testing.assert_close(y, y0, rtol=1e-4, atol=1e-5)
    gradients = (torch.autograd.grad(result.square().sum(), trained) for result in (y, y0))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    with lorica.disabled(model):
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("grad", [True, False])
def test_rows_of_their_own(kind: str, grad: bool) -> None:
    model, _, x = make(kind, "one", "two")
    x = torch.cat([x, x])[:3]
    with torch.set_grad_enabled(grad):
        with lorica.mixed(model, ["two", None, "one"]):
            y = model(x)
        for row, name in enumerate(["two", None, "one"]):
            with lorica.active(model, name or ()):
                torch.testing.assert_close(y[row : row + 1], model(x[row : row + 1]))


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind != "without-bias"])
def test_merged_switched_and_restored(kind: str) -> None:
    model, _, x = make(kind, "one", "two")
    lorica.active(model, "one")
    before = record(model)
    with torch.no_grad():
        one = model(x)
        with lorica.active(model, "two"):
            two = model(x)
        lorica.merge(model, "one")
        torch.testing.assert_close(model(x), one)
        lorica.switch(model, "two")
        torch.testing.assert_close(model(x), two)
        lorica.restore(model)
    assert record(model) == before


def test_merging_needs_a_bias_to_merge_into() -> None:
    model, _, _ = make("without-bias", "one")
    before = record(model)
    with pytest.raises(StateError, match=r"0: the bias on B .* no place in a Linear without a bias"):
        lorica.merge(model)
    assert record(model) == before


def test_switching_keeps_trained_biases_of_the_base_apart() -> None:
    """`bias="lora_only"` replaces the base's bias, `lora_bias` adds to it; both land in one parameter."""
    base: Any = nn.Sequential(nn.Linear(5, 4))
    model: Any = copy.deepcopy(base)
    both: dict[str, Any] = {"bias": "lora_only"}
    for name, more in (("one", both), ("two", both), ("neither", {"lora_bias": False})):
        lorica.adapt(model, config(**more), name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    x, results = torch.randn(3, 5), {}
    with torch.no_grad():
        for name in ("one", "two", "neither"):
            with lorica.active(model, name):
                results[name] = model(x)
        for first, *others in (("one", "two", "one"), ("one", "neither"), ("neither", "one", "neither")):
            for acting in ("one", "neither"):
                lorica.active(model, acting)
                before = record(model)
                for name in (first, *others):
                    lorica.switch(model, name)
                    torch.testing.assert_close(model(x), results[name])
                assert record(lorica.restore(model)) == before
    assert torch.equal(lorica.detach(model)(x), base(x))


def test_it_starts_at_zero() -> None:
    layer: Any = lorica.adapt(nn.Sequential(nn.Linear(5, 4)), config())[0]
    assert not layer.lora_B["default"].bias.any()
    random: Any = lorica.adapt(nn.Sequential(nn.Linear(5, 4)), config(init_lora_weights=False), seed=0)[0]
    bias = random.lora_B["default"].bias
    assert bias.all()
    assert bias.abs().max() <= 2**-0.5


def test_files_there_and_back(tmp_path: Path) -> None:
    model, base, x = make("linear", "one")
    lorica.save(model, tmp_path)
    again = lorica.load(nn.Sequential(base), tmp_path)
    assert torch.equal(again(x), model(x))
    assert lorica.trainable_parameters(model).trainable == 2 * 5 + 4 * 2 + 4


@pytest.mark.parametrize(("lora_bias", "problem"), [(True, "bias is missing"), (False, "has a lora_B.bias")])
def test_a_file_and_its_configuration_disagree(tmp_path: Path, lora_bias: bool, problem: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    lorica.save(lorica.adapt(model, config(lora_bias=not lora_bias)), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    old, new = (f'"lora_bias": {str(value).lower()}' for value in (not lora_bias, lora_bias))
    (tmp_path / "adapter_config.json").write_text(text.replace(old, new))
    with pytest.raises(AdapterError, match=problem):
        lorica.read(tmp_path)


def test_a_bias_of_another_length_is_refused() -> None:
    adapter = lorica.extract(make("linear", "one")[0])
    factors = adapter.factors["0"]
    wrong = lorica.Factors(factors.A, factors.B, factors.scale, bias=torch.ones(3))
    with pytest.raises(AdapterError, match=r"shape of 0: bias \(3,\) in the adapter, \(4,\) in the model"):
        lorica.attach(nn.Sequential(nn.Linear(5, 4)), lorica.Adapter(adapter.config, {"0": wrong}))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_what_it_does_not_go_with(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="lora_bias"):
        config(**more)


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (nn.Sequential(nn.Embedding(4, 3)), "0"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), "0"),
        (nn.TransformerEncoderLayer(4, 2), "linear1"),
    ],
)
def test_where_there_is_no_place_for_it(model: nn.Module, target: str) -> None:
    with pytest.raises(TargetError, match=f"{target}: lora_bias is for"):
        lorica.adapt(model, config(target_modules=[target]))


def test_on_gpt2() -> None:
    model = lorica.adapt(transformer("gpt2"), config(target_modules=["c_attn"], r=2))
    assert "transformer.h.0.attn.c_attn.lora_B.default.bias" in dict(model.named_parameters())
