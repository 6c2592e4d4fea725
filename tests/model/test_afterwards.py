"""What others do to a model after it was adapted: pruning, norms, offloading, tracing, exporting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Toy, shake, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lorica
from lorica import LoraConfig
from lorica.errors import StateError

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def adapted(model: Any = None, **fields: Any) -> Any:
    model = base() if model is None else model
    shake(lorica.adapt(model, LoraConfig(r=2, target_modules=["0", "2"], **fields)))
    return model.eval()


@torch.no_grad()
def update(model: Any) -> list[Tensor]:
    return [f.scale * f.B @ f.A for f in lorica.extract(model).factors.values()]


PUT_ON: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer.eval()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("what", PUT_ON)
def test_a_weight_that_is_computed_since(what: str, fields: dict[str, Any]) -> None:
    """The update stands beside the weight that the layer computes with now."""
    model, plain = adapted(**fields), base()
    expected = adapted(plain, **fields)
    PUT_ON[what](model[0])
    changed = base().eval()
    PUT_ON[what](changed[0])
    with torch.no_grad():
        changed(X)
        for leaf in ("weight", "bias"):
            plain[0]._parameters[leaf].copy_(getattr(changed[0], leaf))
        torch.testing.assert_close(model(X), expected(X))
    before = model(X)
    lorica.extract(model)
    if what != "prune bias":
        with pytest.raises(StateError, match=r"0: its weight is computed since|is no class of lorica's"):
            lorica.merge(model)
        torch.testing.assert_close(model(X), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("what", "fields"), [("prune", {"init_lora_weights": "pissa"}), ("prune bias", {"bias": "all"})]
)
def test_a_parameter_that_an_adapter_replaced_is_computed_since(what: str, fields: dict[str, Any]) -> None:
    """Neither the base's own nor the adapter's can be put in its place; it is said by name."""
    model = adapted(**fields)
    PUT_ON[what](model[0])
    before = model(X)
    for change in (lorica.disabled, lorica.merge, lorica.detach):
        with pytest.raises(StateError, match=r"^0\.(weight|bias) is computed since it was adapted"):
            change(model)
        torch.testing.assert_close(model(X), before)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"bias": "all"}, {"lora_bias": True}])
def test_offloading_by_accelerate(fields: dict[str, Any]) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = adapted(**fields)
    want, factors = model(X), update(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(X), want)
    torch.testing.assert_close(update(model), factors)
    with pytest.raises(StateError, match=r"^0.*the meta device"):
        lorica.merge(model)
    torch.testing.assert_close(model(X), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"bias": "all"}])
def test_traced_exported_copied_and_shared(fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    want = model(X)
    more = torch.cat([X, X])
    traced: Any = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(more), model(more))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), want)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), want)
    torch.testing.assert_close(copy.deepcopy(model)(X), want)
    torch.testing.assert_close(model.share_memory()(X), want)


@pytest.mark.parametrize("make", ["adapt", "load"])
def test_what_was_put_on_in_inference_mode_trains(make: str, tmp_path: Path) -> None:
    config = lorica.LoraConfig(r=2, target_modules=["up"], use_dora=True, modules_to_save=["head"])
    folder = lorica.save(lorica.adapt(Toy(), config), tmp_path)
    model = Toy()
    with torch.inference_mode():
        if make == "adapt":
            lorica.adapt(model, config)
        else:
            lorica.load(model, folder, trainable=True)
        assert torch.is_inference_mode_enabled()
    model(tokens()).square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
