"""`add_weighted_adapter`: options that a type does not take are not looked at, as in PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorica.peft as drop_in

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {"density": 0.5, "majority_sign_method": "frequency", "svd_rank": 1, "svd_clamp": 0.9}


def made(package: Any, parts: int, **options: Any) -> torch.Tensor:
    """What the combination adds to the layer's weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    config = package.LoraConfig(r=2, target_modules=["0"])
    model = package.get_peft_model(model, config, "a")
    names = ["a", "b"][:parts]
    for name in names[1:]:
        model.add_adapter(name, package.LoraConfig(r=2, target_modules=["0"]))
    layer, draw = model.base_model.model[0], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            layer.lora_A[name].weight.normal_(generator=draw)
            layer.lora_B[name].weight.normal_(generator=draw)
    model.add_weighted_adapter(names, [0.5, -1.5][:parts], "new", **options)
    A, B = layer.lora_A["new"].weight, layer.lora_B["new"].weight
    return (layer.scaling["new"] * (B @ A)).detach()


@pytest.mark.parametrize("options", [{"density": 0.5}, {"svd_rank": 1}, OPTIONS], ids=lambda o: ",".join(o))
@pytest.mark.parametrize("kind", ["linear", "cat", "ties", "dare_linear", "svd"])
def test_one_adapter_is_scaled_whatever_the_type(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = (made(p, 1, combination_type=kind, **options) for p in (drop_in, peft))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_two_adapters_and_options_of_other_types(kind: str) -> None:
    ours, theirs = (made(p, 2, combination_type=kind, **OPTIONS) for p in (drop_in, peft))
    torch.testing.assert_close(ours, theirs)


def test_an_option_that_a_type_needs_is_still_asked_for() -> None:
    with pytest.raises(ValueError, match="density"):
        made(drop_in, 2, combination_type="ties")
