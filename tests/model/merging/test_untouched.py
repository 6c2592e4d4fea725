"""A merged model into which something else was put: the base's own weights do not come back beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Toy, bits, shake, tokens
from torch import nn
from torch.nn import Parameter

import lorica
from lorica import LoraConfig
from lorica.errors import StateError


def merged(**fields: Any) -> Any:
    model = lorica.adapt(Toy(), LoraConfig(r=2, target_modules=["up", "embed"], **fields))
    shake(model)
    lorica.merge(model)
    return model


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["head"]}, {"bias": "all"}, {"use_dora": True}])
def test_a_state_loaded_into_it_is_not_half_undone(fields: dict[str, Any], *, assign: bool) -> None:
    model, other = merged(**fields), Toy()
    model.load_state_dict(other.state_dict(), assign=assign)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for undo in (lorica.restore, lambda model: lorica.switch(model, "default")):
        with pytest.raises(StateError, match=r"weight was (written to|replaced) since the merge"):
            undo(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(tokens()), other(tokens()))


def test_it_names_the_weight() -> None:
    model = merged()
    with torch.no_grad():
        model.blocks[1]["up"].weight.add_(1)
    with pytest.raises(StateError, match=r"^blocks\.1\.up\.weight was written to since the merge"):
        lorica.restore(model)
    model = merged()
    model.blocks[1]["up"] = nn.Linear(6, 12)
    with pytest.raises(StateError, match=r"^blocks\.1\.up\.weight was replaced since the merge"):
        lorica.restore(model)


def test_meta_is_refused() -> None:
    model = merged().to("meta")
    with pytest.raises(StateError, match=r"embed\.weight was moved to the meta device since the merge"):
        lorica.restore(model)


@pytest.mark.parametrize("way", [["bfloat16"], ["bfloat16", "float32"], ["float64"], ["float16", "float32"]])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["head"]}, {"bias": "all"}, {"use_dora": True}])
def test_another_dtype_is_followed(fields: dict[str, Any], way: list[str]) -> None:
    model = merged(**fields)
    twin = lorica.adapt(Toy(), LoraConfig(r=2, target_modules=["up", "embed"], **fields))
    shake(twin)
    twin.load_state_dict(lorica.restore(merged(**fields)).state_dict())
    W0 = model.lorica_state.aside.modules[1].originals["weight"].detach().clone()
    for name in way:
        model.to(getattr(torch, name))
    restored = lorica.restore(model)
    dtype = getattr(torch, way[-1])
    assert {p.dtype for p in restored.parameters()} <= {dtype, torch.float32}
    assert restored.blocks[0]["up"]._parameters["weight"].dtype == dtype
    assert bits(restored.blocks[0]["up"]._parameters["weight"]) == bits(W0.to(dtype))
    assert restored(tokens()).dtype == dtype


def test_reading_moving_and_switching_are_no_writing() -> None:
    model = merged(modules_to_save=["head"])
    lorica.switch(model, "default")
    model.share_memory().eval().train()
    with torch.inference_mode():
        model(tokens())
    model.state_dict()
    model.requires_grad_(True)
    model(tokens()).sum().backward()
    lorica.switch(model, "default")
    lorica.restore(model)


def test_weights_that_are_no_adapter_s_may_change() -> None:
    model = merged()
    with torch.no_grad():
        model.norm.weight.add_(1)
        want = model(tokens())
    model.norm.weight = Parameter(model.norm.weight.detach().clone())
    torch.testing.assert_close(lorica.restore(model)(tokens()), want)
