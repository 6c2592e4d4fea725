"""A script written for loralib runs by ``import lorica.loralib as lora``, and reads the same files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica.loralib as ours

theirs = pytest.importorskip("loralib", reason="needs loralib: pip install 'lorica[peers]'")

# How to make the layer with a library, and an input for it.
CASES: dict[str, tuple[Callable[[Any], Any], tuple[int, ...] | Tensor]] = {
    "linear": (lambda lora: lora.Linear(6, 4, r=2, lora_alpha=3), (5, 6)),
    "linear, three dimensions": (lambda lora: lora.Linear(6, 4, r=3, lora_alpha=8), (2, 5, 6)),
    "linear, no bias": (lambda lora: lora.Linear(6, 4, r=2, bias=False), (5, 6)),
    "linear, (in, out)": (lambda lora: lora.Linear(6, 4, r=2, lora_alpha=3, fan_in_fan_out=True), (5, 6)),
    "linear, r=0": (lambda lora: lora.Linear(6, 4), (5, 6)),
    "linear, never merged": (lambda lora: lora.Linear(6, 4, r=2, lora_alpha=3, merge_weights=False), (5, 6)),
    **{
        f"merged {pattern} {layout}": (
            lambda lora, pattern=pattern, layout=layout: lora.MergedLinear(
                6,
                12,
                r=2,
                lora_alpha=4,
                enable_lora=[c == "1" for c in pattern],
                fan_in_fan_out=layout == "(in, out)",
            ),
            (2, 5, 6),
        )
        for pattern in ("101", "111", "010", "1", "0111")
        for layout in ("(out, in)", "(in, out)")
    },
    "merged, r=0": (lambda lora: lora.MergedLinear(6, 12, enable_lora=[True, False, True]), (5, 6)),
    "embedding": (lambda lora: lora.Embedding(7, 4, r=2, lora_alpha=3), torch.tensor([[1, 2, 1], [6, 0, 3]])),
    "embedding, padding": (
        lambda lora: lora.Embedding(7, 4, r=2, lora_alpha=3, padding_idx=1),
        torch.tensor([[1, 2, 1], [6, 0, 3]]),
    ),
    "embedding, by frequency": (
        lambda lora: lora.Embedding(7, 4, r=2, scale_grad_by_freq=True),
        torch.tensor([[1, 2, 1], [6, 0, 3]]),
    ),
    "embedding, r=0": (lambda lora: lora.Embedding(7, 4), torch.tensor([1, 2])),
    "conv2d": (lambda lora: lora.Conv2d(4, 6, 3, r=2, lora_alpha=3), (2, 4, 7, 7)),
    "conv2d, strided": (
        lambda lora: lora.Conv2d(4, 6, 3, r=2, stride=2, padding=1, bias=False),
        (2, 4, 7, 7),
    ),
    "conv2d, groups": (lambda lora: lora.Conv2d(4, 6, 3, r=2, lora_alpha=3, groups=2), (2, 4, 7, 7)),
    "conv2d, reflected": (
        lambda lora: lora.Conv2d(4, 6, 3, 2, padding=1, padding_mode="reflect"),
        (2, 4, 7, 7),
    ),
    "conv1d, a point": (lambda lora: lora.Conv1d(4, 6, 1, r=2, lora_alpha=3), (2, 4, 7)),
    "conv3d, a point": (lambda lora: lora.Conv3d(4, 6, 1, r=2, lora_alpha=3), (2, 4, 3, 3, 3)),
    "conv2d, r=0": (lambda lora: lora.Conv2d(4, 6, 3), (2, 4, 7, 7)),
}


def make(name: str, library: Any, *, shake: bool = True) -> Any:
    torch.manual_seed(3)
    layer = CASES[name][0](library)
    if shake:
        with torch.no_grad():
            for factor in ("lora_A", "lora_B"):
                if hasattr(layer, factor):
                    getattr(layer, factor).normal_(0, 0.5)
    return layer


def input_for(name: str) -> Tensor:
    x = CASES[name][1]
    return x if isinstance(x, Tensor) else torch.randn(x, generator=torch.Generator().manual_seed(1))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * max(1, float(other.detach().abs().max())))


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = layer(leaf)
    if y.requires_grad:
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {"input": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("name", CASES)
class TestLayers:
    """Layer by layer, the same settings."""

    def test_a_seed_draws_the_same(self, name: str) -> None:
        one, other = (make(name, library, shake=False) for library in (ours, theirs))
        assert list(one.state_dict()) == list(other.state_dict())
        for key, tensor in other.state_dict().items():
            assert torch.equal(one.state_dict()[key], tensor), key
        trained = [{n: p.requires_grad for n, p in layer.named_parameters()} for layer in (one, other)]
        assert trained[0] == trained[1]

    def test_outputs_and_gradients(self, name: str) -> None:
        one, other = (make(name, library) for library in (ours, theirs))
        x = input_for(name)
        close(one(x), other(x))
        found, expected = gradients(one, x), gradients(other, x)
        assert found.keys() == expected.keys()
        for leaf, gradient in expected.items():
            mine = found[leaf]
            if gradient is None:
                assert mine is None, leaf
            else:
                assert mine is not None, leaf
                close(mine, gradient)

    def test_evaluation(self, name: str) -> None:
        one, other = (make(name, library) for library in (ours, theirs))
        x, trained = input_for(name), make(name, ours)
        one.eval()
        other.train(False)
        close(one(x), other(x))
        close(one(x), trained(x))
        weight, expected = (getattr(layer, "conv", layer).weight for layer in (one, other))
        close(weight.detach(), expected.detach())

    def test_files_cross_both_ways(self, name: str, tmp_path: Path) -> None:
        x = input_for(name)
        for source, target in ((ours, theirs), (theirs, ours)):
            trained = make(name, source)
            torch.save(trained.state_dict(), tmp_path / "pretrained.pt")
            torch.save(source.lora_state_dict(nn.Sequential(trained)), tmp_path / "lora.pt")
            fresh = nn.Sequential(CASES[name][0](target))
            fresh[0].load_state_dict(torch.load(tmp_path / "pretrained.pt"))
            before = copy.deepcopy(fresh.state_dict())
            unexpected = fresh.load_state_dict(torch.load(tmp_path / "lora.pt"), strict=False).unexpected_keys
            assert unexpected == []
            assert all(torch.equal(before[key], tensor) for key, tensor in fresh.state_dict().items())
            close(fresh(x), trained(x))


class Block(nn.Module):
    """A model as loralib's README has its user write one."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.table = lora.Embedding(9, 6, r=2)
        self.qkv = lora.MergedLinear(6, 18, r=2, lora_alpha=4, enable_lora=[True, False, True])
        self.out = lora.Linear(6, 6, r=3, lora_alpha=6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm(x + self.out(torch.softmax(q @ k.mT, -1) @ v))
        return self.head(x.mean(1))


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 3, 5, 7]])


def script(lora: Any, bias: str, folder: Path) -> tuple[dict[str, Tensor], list[float], Tensor]:
    """Pretrain, adapt, evaluate between epochs, save, load into a new process's model: what a user does."""
    torch.manual_seed(0)
    torch.save(Block(lora).state_dict(), folder / "pretrained.pt")
    model = Block(lora)
    model.load_state_dict(torch.load(folder / "pretrained.pt"), strict=False)
    lora.mark_only_lora_as_trainable(model, bias=bias)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        model.train()
        loss = nn.functional.cross_entropy(model(TOKENS), torch.tensor([0, 1, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        model.eval()
    model.train()
    torch.save(lora.lora_state_dict(model, bias=bias), folder / "lora.pt")
    served = Block(lora)
    served.load_state_dict(torch.load(folder / "pretrained.pt"), strict=False)
    served.load_state_dict(torch.load(folder / "lora.pt"), strict=False)
    served.eval()
    return torch.load(folder / "lora.pt"), losses, served(TOKENS)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_script(bias: str, tmp_path: Path) -> None:
    folders = tmp_path / "ours", tmp_path / "theirs"
    for folder in folders:
        folder.mkdir()
    found, expected = (
        script(lora, bias, folder) for lora, folder in zip((ours, theirs), folders, strict=True)
    )
    assert found[0].keys() == expected[0].keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected[1][-1] < expected[1][0]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_trains(bias: str) -> None:
    trained = []
    for lora in (ours, theirs):
        model = Block(lora)
        lora.mark_only_lora_as_trainable(model, bias=bias)
        trained.append({name for name, p in model.named_parameters() if p.requires_grad})
    assert trained[0] == trained[1]


def test_signatures() -> None:
    """Positional arguments mean the same."""
    x = torch.randn(5, 6)
    for make_layer in (
        lambda lora: lora.Linear(6, 4, 2, 3, 0.0, True, False),
        lambda lora: lora.MergedLinear(6, 4, 2, 3, 0.0, [True, False], True, False),
    ):
        layers = []
        for lora in (ours, theirs):
            torch.manual_seed(0)
            layers.append(make_layer(lora))
        close(layers[0](x), layers[1](x))
        for name in ("r", "lora_alpha", "fan_in_fan_out", "merge_weights", "scaling"):
            assert getattr(layers[0], name) == getattr(layers[1], name)
