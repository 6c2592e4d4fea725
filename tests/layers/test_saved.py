"""Modules trained whole: one copy for each adapter, and the one that acts answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Toy, shake, tokens
from torch import nn

import lorica
from lorica.errors import AdapterError, StateError, TargetError
from lorica.layers import SavedModule


def two_heads() -> Any:
    """A model with adapters "a" and "b", each with a trained head of its own, and "plain" without."""
    model: Any = Toy()
    for name in "ab":
        lorica.adapt(model, lorica.LoraConfig(target_modules=["up"], modules_to_save=["head"]), name)
        shake(model)
    return lorica.adapt(model, lorica.LoraConfig(target_modules=["up"]), "plain")


def test_it_starts_as_a_copy_that_trains_and_the_original_stays_frozen() -> None:
    model: Any = Toy()
    own = model.head.weight
    lorica.adapt(model, lorica.LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    copy = model.head.modules_to_save["default"]
    assert isinstance(model.head, SavedModule)
    assert isinstance(model.head, nn.Linear)
    assert type(copy) is nn.Linear
    assert model.head._parameters["weight"] is own
    assert model.head.weight is copy.weight
    assert not own.requires_grad
    assert copy.weight.requires_grad
    assert torch.equal(copy.weight, own)
    assert copy.weight.data_ptr() != own.data_ptr()


def test_the_acting_adapters_copy_answers() -> None:
    model = two_heads()
    x = torch.randn(2, 6)
    for name in "ab":
        lorica.active(model, name)
        assert torch.equal(model.head(x), model.head.modules_to_save[name](x))
    lorica.active(model, ["plain"])
    original = nn.functional.linear(x, model.head.weight, model.head.bias)
    assert torch.equal(model.head(x), original)
    lorica.disabled(model)
    assert torch.equal(model.head(x), original)
    lorica.active(model, ["plain", "a"])
    assert torch.equal(model.head(x), model.head.modules_to_save["a"](x))


def test_only_that_copy_trains() -> None:
    model = two_heads()
    lorica.active(model, "b")
    model(tokens()).sum().backward()
    trained = {name for name, p in model.named_parameters() if name.startswith("head") and p.grad is not None}
    assert trained == {"head.modules_to_save.b.weight", "head.modules_to_save.b.bias"}


def test_two_copies_cannot_act_together_and_the_one_that_acted_goes_on() -> None:
    model = two_heads()
    lorica.active(model, "a")
    expected = model(tokens())
    with pytest.raises(AdapterError, match="'a', 'b' cannot act together: each brings its own head"):
        lorica.active(model, ["a", "b"])
    assert torch.equal(model(tokens()), expected)


def test_hooks_run_once_whichever_copy_answers() -> None:
    model: Any = Toy()
    calls: list[str] = []
    model.head.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model.head.register_forward_hook(lambda *_: calls.append("after"))
    lorica.adapt(model, lorica.LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    shake(model)
    x = torch.randn(2, 6)
    copy = model.head.modules_to_save["default"]
    assert torch.equal(model.head(x), nn.functional.linear(x + 1, copy.weight, copy.bias))
    assert calls == ["after"]


def test_a_module_made_of_several() -> None:
    model: Any = Toy()
    model.head = head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    lorica.adapt(model, lorica.LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    assert isinstance(head, SavedModule)
    model(tokens())
    batches = {key: int(value) for key, value in model.state_dict().items() if "num_batches" in key}
    assert batches == {
        "head.0.num_batches_tracked": 0,
        "head.modules_to_save.default.0.num_batches_tracked": 1,
    }
    assert set(head.base_state()) == set(head.modules_to_save["default"].state_dict())


def test_a_dropped_copy_leaves_the_others() -> None:
    model = two_heads()
    head = model.head
    lorica.detach(model, "a")
    assert list(head.modules_to_save) == ["b"]
    lorica.detach(model, "b")
    assert type(head) is nn.Linear
    assert list(lorica.adapters(model)) == ["plain"]


@pytest.mark.parametrize("kind", ["ModuleDict", "ModuleList", "ParameterDict", "ParameterList"])
def test_a_container_that_nobody_calls_is_refused(kind: str) -> None:
    part: Any = nn.Parameter(torch.ones(2)) if kind.startswith("Parameter") else nn.Linear(2, 2)
    held = getattr(nn, kind)({"a": part} if kind.endswith("Dict") else [part])
    model = nn.ModuleDict({"held": held, "layer": nn.Linear(2, 2)})
    before = list(model.state_dict())
    with pytest.raises(TypeError, match=rf"modules of type .*{kind}.*name what is in it: held\.[a0]"):
        lorica.adapt(model, lorica.LoraConfig(target_modules=["layer"], modules_to_save=["held"]))
    assert list(model.state_dict()) == before


def test_rows_of_a_module_that_is_called_by_keywords_alone() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, *, pixels: torch.Tensor) -> torch.Tensor:
            return self.inner(pixels)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.out = Tower(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.tower(pixels=x))

    model = lorica.adapt(Net(), lorica.LoraConfig(r=1, target_modules=["out"], modules_to_save=["tower"]))
    x = torch.randn(2, 2)
    model(x)
    with lorica.mixed(model, ["default", None]), pytest.raises(StateError, match=r"\(pixels\).*the rows"):
        model(x)


class Reader(nn.Module):
    """A scorer by its own table's weight, as MobileBERT's head and torch's fused kernels read theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table.weight.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_part_whose_weight_its_parent_reads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), Reader()).to(dtype)
    lorica.adapt(model, lorica.LoraConfig(r=1, target_modules=["0"], modules_to_save=["table"]))
    own = model[1].table.modules_to_save["default"].weight
    with torch.no_grad():
        own.add_(1)
    x = torch.randn(2, 4, dtype=dtype)
    y = model(x)
    assert torch.equal(y, model[0](x) @ own.mT)
    y.sum().backward()
    assert own.grad is not None
    with pytest.raises(StateError, match=r"1\.table is read past its layer"):
        lorica.mixed(model, ["default", None])


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("whole_first", [False, True])
def test_a_head_that_one_adapter_updates_and_another_trains_whole(
    whole_first: bool, loaded: bool, tmp_path: Path
) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(4, 2)})

    updated = lorica.LoraConfig(r=2, target_modules=["body", "head"])
    whole = lorica.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    first, second = (whole, updated) if whole_first else (updated, whole)
    carrying = lorica.adapt(model(), first, "one")
    lorica.save(lorica.adapt(model(), second, "two"), tmp_path, "two")
    before = list(carrying.state_dict())
    refused = "kind of head: linear in the adapter" if loaded else "head is trained whole by another"
    refusal = refused if whole_first else "head cannot be trained whole: another adapter"
    put, given = (lorica.load, tmp_path) if loaded else (lorica.adapt, second)
    with pytest.raises((TargetError, AdapterError), match=refusal):
        put(carrying, given, "two")  # pyright: ignore[reportArgumentType]
    assert list(carrying.state_dict()) == before
