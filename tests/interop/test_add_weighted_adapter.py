"""`lorica.algebra.combine` and PEFT's `add_weighted_adapter` make the same adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import update
from tiny import VOCABULARY, outputs, shake
from torch import Tensor, nn

import lorica
from lorica import Adapter, algebra

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")

# PEFT warns of its own future; that is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = [0.7, -1.3]
TARGETS = ["table", "conv", "point", "linear"]
FACTORWISE = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


class Net(nn.Module):
    """One of each kind of layer whose adapters PEFT can combine."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.linear = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.linear(x + self.point(torch.tanh(self.conv(x[:, None]))).mean(1)).mean(1)


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def two(folder: Path, *settings: dict[str, Any]) -> tuple[Any, list[Adapter]]:
    """PEFT's model with two trained adapters, and the same two read from its files."""
    first, second = ({"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | more for more in settings)
    model = peft.get_peft_model(base(), peft.LoraConfig(**first), adapter_name="one")
    model.add_adapter("other", peft.LoraConfig(**second))
    for seed, name in enumerate(("one", "other")):
        model.set_adapter(name)
        shake(model, seed)
    model.eval().save_pretrained(folder)
    return model, [lorica.read(folder / name) for name in ("one", "other")]


def deltas(model: Any, name: str = "new") -> dict[str, Tensor]:
    """An adapter's updates on PEFT's model, (d_out, ...)."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and name in module.scaling:
            delta = module.get_delta_weight(name).detach().double()
            found[path] = delta.T if isinstance(module.get_base_layer(), nn.Embedding) else delta
    return found


def agree(adapter: Adapter, theirs: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert adapter.factors.keys() == theirs.keys()
    for path, delta in theirs.items():
        torch.testing.assert_close(
            update(adapter.factors[path]), delta, rtol=0, atol=tolerance * float(delta.abs().max())
        )


def the_same_mask(probabilities: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """A stand-in for `torch.bernoulli`: what is dropped depends on the place alone."""
    places = torch.arange(probabilities.numel()).view(probabilities.shape)
    return ((places * 7) % 10 < 10 * probabilities).to(probabilities.dtype)


def options(method: str) -> dict[str, Any]:
    return {"density": 0.6} if "density" in algebra.METHODS[method] else {}


@pytest.mark.parametrize("method", algebra.METHODS)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.5]], ids=str)
def test_the_same_adapter(
    method: str, weights: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "bernoulli", the_same_mask)
    second = {"lora_alpha": 3, **({} if method in FACTORWISE else {"r": 2})}
    # A mask by place would fall otherwise on an embedding's update, which PEFT has transposed.
    targets = {"target_modules": ["linear", "conv"]} if method.startswith("dare") else {}
    model, adapters = two(tmp_path / "terms", targets, second | targets)
    model.add_weighted_adapter(["one", "other"], weights, "new", method, **options(method))
    ours = algebra.combine(adapters, weights, method, **options(method))
    agree(ours, deltas(model))
    model.set_adapter("new")
    lorica.write(ours, tmp_path / "ours")
    in_peft = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    for result in (outputs(in_peft), outputs(lorica.load(base(), tmp_path / "ours"))):
        torch.testing.assert_close(result, outputs(model), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("ties", {"majority_sign_method": "frequency"}),
        ("ties_svd", {"majority_sign_method": "frequency"}),
        ("svd", {"svd_rank": 2}),
        ("svd", {"svd_rank": 3, "svd_clamp": 0.9}),
        ("magnitude_prune_svd", {"svd_rank": 3, "svd_clamp": 0.95}),
        ("magnitude_prune_svd", {"svd_rank": 1, "density": 0.3}),
    ],
)
def test_with_each_option(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    model, adapters = two(tmp_path, {}, {"lora_alpha": 3})
    told = options(method) | more
    model.add_weighted_adapter(
        ["one", "other"],
        WEIGHTS,
        "new",
        method,
        **told,
        **({"svd_full_matrices": False} if "svd" in method else {}),
    )
    theirs = deltas(model)
    ours = algebra.combine(adapters, WEIGHTS, method, **told)
    if (
        "svd_clamp" in more
    ):  # depends on the vectors' signs; PEFT decomposes the transpose of an embedding's product
        theirs.pop("table")
        ours = Adapter(ours.config, {path: f for path, f in ours.factors.items() if path != "table"})
    agree(ours, theirs)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_other_targets_and_patterns(method: str, tmp_path: Path) -> None:
    first = {"target_modules": ["table", "linear"], "rank_pattern": {"linear": 2}}
    second = {
        "target_modules": ["conv", "linear"],
        "rank_pattern": {"linear": 2},
        "alpha_pattern": {"conv": 9},
    }
    model, adapters = two(tmp_path / "terms", first, second)
    model.add_weighted_adapter(["one", "other"], WEIGHTS, "new", method)
    ours = algebra.combine(adapters, WEIGHTS, method)
    agree(ours, deltas(model))
    lorica.write(ours, tmp_path / "ours")
    in_peft = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    model.set_adapter("new")
    torch.testing.assert_close(outputs(in_peft), outputs(model), rtol=2e-6, atol=2e-6)
    ranks = {
        path: module.r["default"]
        for path, module in in_peft.base_model.model.named_modules()
        if hasattr(module, "r")
    }
    assert ranks == {path: f.r for path, f in ours.factors.items()}


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties"])
def test_rslora_has_the_right_scale_here(method: str, tmp_path: Path) -> None:
    rooted = {"use_rslora": True}
    model, adapters = two(tmp_path / "terms", rooted, rooted | {"lora_alpha": 3})
    sum_of_both = {path: WEIGHTS[0] * d for path, d in deltas(model, "one").items()}
    for path, d in deltas(model, "other").items():
        sum_of_both[path] = sum_of_both[path] + WEIGHTS[1] * d
    model.add_weighted_adapter(["one", "other"], WEIGHTS, "new", method, **options(method))
    ours = algebra.combine(adapters, WEIGHTS, method, **options(method))
    # When this fails PEFT has mended it: then its updates are ours, without the root.
    root = math.sqrt(8 if method == "cat" else 4)
    agree(ours, {path: delta / root for path, delta in deltas(model).items()})
    if method == "cat":
        agree(ours, sum_of_both)
    lorica.write(ours, tmp_path / "ours")
    in_peft = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(
        outputs(in_peft), outputs(lorica.load(base(), tmp_path / "ours")), rtol=2e-6, atol=2e-6
    )


def test_a_rank_above_the_layers_loads_and_runs(tmp_path: Path) -> None:
    wide = {"r": 16, "target_modules": ["linear", "table"]}
    _, adapters = two(tmp_path / "terms", wide, wide)
    lorica.write(algebra.combine(adapters, WEIGHTS, "svd", svd_rank=16), tmp_path / "ours")
    lorica.write(algebra.combine(adapters, WEIGHTS), tmp_path / "sum")
    svd, whole = (peft.PeftModel.from_pretrained(base(), tmp_path / name).eval() for name in ("ours", "sum"))
    torch.testing.assert_close(outputs(svd), outputs(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_compressed_adapter_in_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    _, (one, _) = two(tmp_path / "terms", settings, settings)
    compressed, report = algebra.compress(one, energy=0.9)
    assert len({f.r for f in compressed.factors.values()}) > 1
    assert report.worst[1] > 0.05
    lorica.write(compressed, tmp_path / "ours")
    in_peft = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    ours = lorica.load(base(), tmp_path / "ours")
    torch.testing.assert_close(outputs(in_peft), outputs(ours), rtol=2e-6, atol=2e-6)
