"""Float32 copies of the base's own parameters (biases, or all of them) beside a base in half precision."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, bits, transformer
from torch import Tensor, nn

import lorica
from lorica import LoraConfig
from lorica.methods import BitFitConfig, FullConfig, TopConfig

HALVES = [torch.float16, torch.bfloat16]


class Net(nn.Module):
    """Layers of many kinds; those that torch reads without a call come last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.shift = nn.Parameter(torch.randn(8) / 4)
        self.a = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.a(self.embed(ids)) + self.shift)
        x = x + self.conv(x.mT).mT
        return self.head(self.encoder(x))


IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
READ = ("encoder.",)
METHODS: dict[str, Any] = {
    "all biases": LoraConfig(r=2, target_modules=["a", "conv"], bias="all"),
    "biases of LoRA": LoraConfig(r=2, target_modules=["a", "conv", "head"], bias="lora_only"),
    "BitFit": BitFitConfig(),
    "full": FullConfig(),
}


def adapted(method: str, dtype: torch.dtype, name: str = "default", base: Any = None) -> Any:
    return lorica.adapt(Net().to(dtype) if base is None else base, METHODS[method], name, seed=0)


def trained(model: Any, amount: float = 1e-3, seed: int = 1) -> Any:
    """Every trained value moved, by less than half precision could tell."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn(parameter.shape, generator=random)
    return model


def copies(model: Any) -> dict[str, nn.Parameter]:
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert found
    return found


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def plain(model: Any, method: str, dtype: torch.dtype) -> Any:
    """The base with the rounded values in it, and the same A and B."""
    other = adapted(method, dtype)
    own = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                own[name].copy_(parameter)
    lorica.detach(other)
    low = Net().to(dtype)
    with torch.no_grad():
        for name, parameter in copies(model).items():
            low.get_parameter(name).copy_(parameter)
    return low


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", METHODS)
def test_they_are_float32_and_compute_rounded(method: str, dtype: torch.dtype) -> None:
    model = trained(adapted(method, dtype))
    for name, parameter in copies(model).items():
        assert parameter.dtype == (dtype if name.startswith(READ) else torch.float32)
    low = plain(model, method, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.zero_()
    for mode in (True, False):
        y = model.train(mode)(IDS)
        assert y.dtype == dtype
        assert torch.equal(y, low.train(mode)(IDS))
    y.sum().backward()
    low(IDS).sum().backward()
    for name, parameter in copies(model).items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert torch.equal(parameter.grad.to(dtype), low.get_parameter(name).grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_scaler_steps(method: str) -> None:
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)).half()
    config = METHODS[method]
    if isinstance(config, LoraConfig):
        config = config.replace(target_modules=["0"])
    model = lorica.adapt(base, config)
    before = {name: p.detach().clone() for name, p in copies(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with torch.autocast("cpu", torch.float16):
        loss = nn.functional.cross_entropy(
            model(torch.randn(4, 8).half()).float(), torch.tensor([0, 1, 2, 0])
        )
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for name, parameter in copies(model).items():
        assert torch.equal(parameter, before[name] - 1e-3 * parameter.grad)  # pyright: ignore[reportOperatorIssue]
    assert any(not torch.equal(p, before[name]) for name, p in copies(model).items())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_merged_switched_and_restored(method: str, dtype: torch.dtype) -> None:
    model = trained(adapted(method, dtype))
    base = state(Net().to(dtype))
    adapted(method, dtype, "two", model)
    trained(model, 0.1, 2)
    lorica.active(model, "default")
    masters = {name: p.clone() for name, p in copies(model).items()}
    one = model(IDS)
    lorica.active(model, "two")
    two = model(IDS)
    assert not torch.equal(one, two)
    lorica.merge(model, "default")
    for name, expected in (("default", one), ("two", two), ("default", one)):
        lorica.switch(model, name)
        assert {p.dtype for p in model.parameters()} == {dtype}
        torch.testing.assert_close(model(IDS), expected, rtol=2e-2, atol=2e-2)
    for name, master in masters.items():
        assert torch.equal(model.get_parameter(name), master.to(dtype))
    lorica.restore(model)
    assert torch.equal(model(IDS), two)
    lorica.active(model, "default")
    assert torch.equal(model(IDS), one)
    assert all(torch.equal(p, masters[name]) and p.requires_grad for name, p in copies(model).items())
    with lorica.disabled(model):
        assert torch.equal(model(IDS), Net().to(dtype)(IDS))
    lorica.detach(model)
    assert state(model) == base
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path, method: str) -> None:
    model = trained(adapted(method, torch.float16))
    lorica.save(model, tmp_path)
    for trainable in (False, True):
        other = lorica.load(Net().half(), tmp_path, trainable=trainable)
        assert torch.equal(other(IDS), model(IDS))
        mine, theirs = lorica.extract(model).named_tensors(), lorica.extract(other).named_tensors()
        assert all(torch.equal(theirs[key], tensor) for key, tensor in mine.items())
    other = adapted(method, torch.float16)
    lorica.load_weights(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(IDS), model(IDS))
        trained(again, 0.1)
        assert not torch.equal(again(IDS), model(IDS))
        lorica.detach(again)
        assert torch.equal(again(IDS), Net().half()(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_the_model_moves_to_another_dtype(dtype: torch.dtype) -> None:
    model = trained(adapted("all biases", torch.float16), 0.1)
    expected = model(IDS)
    model.to(dtype)
    y = model(IDS)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=5e-2, atol=5e-2)
    lorica.active(model, ())
    lorica.active(model, "default")
    assert torch.equal(model(IDS), y)
    lorica.detach(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(model(IDS), Net().half().to(dtype)(IDS))


@pytest.mark.parametrize("config", [BitFitConfig(), FullConfig(), TopConfig(blocks=1)])
@pytest.mark.parametrize("name", ["bert-classifier", "llama", "gpt2", "t5"])
@pytest.mark.filterwarnings("ignore")
def test_on_models_of_transformers(name: str, config: Any) -> None:
    torch.manual_seed(0)
    model, inputs = transformer(name, dtype=torch.float16), batch(name)
    with torch.no_grad():  # torch chooses kernels by what needs gradients
        expected = model(**inputs).logits
    try:
        lorica.adapt(model, config)
    except lorica.LoricaError:
        pytest.skip("has no biases")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    y = model(**inputs).logits
    y.float().sum().backward()
    found = copies(model)
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert sum(p.grad is not None for p in found.values()) > len(found) / 2


@torch.no_grad()
def test_what_is_tied_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    model: Any = trained(lorica.adapt(Tied().half(), FullConfig()), 0.1)
    assert model.head.weight is model.embed.weight
    y = model(IDS)
    lorica.merge(model)
    assert model.head.weight is model.embed.weight
    assert model.head.weight.dtype == torch.float16
    assert torch.equal(model(IDS), y)
    lorica.finalize(model)
    assert torch.equal(model(IDS), y)
