"""Factors of mixed adapters lie side by side in memory, and remain what they were to everybody else."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorica
from lorica.layers.rows import blocks

NAMES = ("a", "b", "c", "d", "e")


def made(*names: str, r: int = 2) -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    for name in names:
        oracle.adapted(model, "0", "2", name=name, r=r)
    return model.eval()


def factor(model: Any, name: str) -> nn.Parameter:
    return model[0].lora_A[name].weight


@torch.no_grad()
def check(model: Any, names: Sequence[str | None]) -> None:
    """A mixture made anew gives each row what its adapter gives alone."""
    x = torch.randn(len(names), 6)
    with lorica.mixed(model, names):
        together = model(x)
    for i, name in enumerate(names):
        with lorica.active(model, name or ()):
            torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]))


def memory(model: Any) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad]


def test_they_move_once_and_any_rows_are_an_index_afterwards() -> None:
    model = made(*NAMES)
    before = {name: (factor(model, name), factor(model, name).detach().clone()) for name in NAMES}
    check(model, NAMES)
    stay = memory(model)
    starts = sorted(factor(model, name).data_ptr() for name in NAMES)
    assert [b - a for a, b in itertools.pairwise(starts)] == [2 * 6 * 4] * 4
    for names in (("c", "a"), ("e", None, "b", "e"), ("d", "d", "a", "c", None, "b"), ("b",)):
        check(model, names)
    assert memory(model) == stay
    for name, (parameter, value) in before.items():
        assert factor(model, name) is parameter
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("write", ["optimizer", "data", "exchanged", "replaced", "scale"])
def test_what_is_written_to_a_factor_is_seen(write: str) -> None:
    model = made(*NAMES)
    check(model, NAMES)
    A = factor(model, "b")
    if write == "optimizer":
        optimizer = torch.optim.AdamW([A], lr=0.5)
        with lorica.active(model, "b"):
            model(torch.randn(3, 6)).sum().backward()
        optimizer.step()
    elif write == "data":
        A.data.mul_(3)
    elif write == "replaced":
        model[0].lora_A["b"]._parameters["weight"] = nn.Parameter(torch.randn_like(A))
    elif write == "scale":
        model[0].scaling["b"] = 5.0
    else:
        A.data = torch.randn_like(A)
    check(model, NAMES)


def test_what_another_moves_while_a_mixture_is_made_is_looked_up_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made(*NAMES)
    check(model, NAMES)
    take = blocks.Block.take

    def beside(block: blocks.Block, *args: Any) -> Any:
        found = take(block, *args)
        monkeypatch.setattr(blocks.Block, "take", take)
        A = factor(model, "b")
        A.data = torch.randn_like(A)
        check(model, ["b", "a"])
        return found

    monkeypatch.setattr(blocks.Block, "take", beside)
    with torch.no_grad(), lorica.mixed(model, NAMES[:3]):
        model(torch.randn(3, 6))
    check(model, NAMES[:3])


@torch.no_grad()
def test_within_a_mixture_too() -> None:
    model, x = made(*NAMES), torch.randn(2, 6)
    with lorica.mixed(model, ["a", "b"]):
        first = model(x)
        factor(model, "b").data.mul_(3)
        second = model(x)
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_memory_that_a_value_refers_to_stays() -> None:
    model = made(*NAMES)
    value = lorica.extract(model, "b")
    check(model, NAMES)
    factor(model, "b").data.mul_(2)
    assert torch.equal(value.factors["0"].A, factor(model, "b"))
    check(model, NAMES)
    del value
    check(model, NAMES)
    value = lorica.extract(model, "b")
    check(model, ["b", "a"])
    factor(model, "b").data.mul_(2)
    assert torch.equal(value.factors["0"].A, factor(model, "b"))


def test_one_is_saved_pickled_and_copied_without_the_others(tmp_path: Path) -> None:
    model = made(*NAMES)
    check(model, NAMES)
    A = factor(model, "b")
    assert A.untyped_storage().nbytes() == A.nbytes
    saved, alone = io.BytesIO(), io.BytesIO()
    torch.save(A, saved)
    torch.save(nn.Parameter(A.detach().clone()), alone)
    assert len(saved.getvalue()) == len(alone.getvalue())
    lorica.save(model, tmp_path, "b")
    assert torch.equal(
        load_file(tmp_path / "adapter_model.safetensors")["base_model.model.0.lora_A.weight"], A
    )
    twin = copy.deepcopy(model)
    factor(twin, "b").data.mul_(3)
    assert torch.equal(A, lorica.extract(model, "b").factors["0"].A)
    check(twin, NAMES)
    check(model, NAMES)


def test_adapters_come_and_go() -> None:
    model = made(*NAMES)
    check(model, NAMES)
    for name in ("a", "d", "e"):
        lorica.detach(model, name)
    check(model, ["c", None, "b"])
    for name in ("f", "g", "a", "h"):
        oracle.adapted(model, "0", "2", name=name, r=2 if name != "g" else 3)
    check(model, ["a", "b", "c", "f", "g", "h", None, "a"])
    assert memory(model[0])[:2] != memory(model[2])[:2]
    lorica.detach(model)
    assert type(model[0]) is nn.Linear


def test_a_value_outlives_its_adapter() -> None:
    model = made(*NAMES)
    check(model, NAMES)
    value = lorica.extract(model, "b")
    A = value.factors["0"].A
    before = A.clone()
    lorica.detach(model, "b")
    for name in "fghijklm":
        oracle.adapted(model, "0", "2", name=name, r=2)
    check(model, ["f", "g", "h", "i", "j", "k", "l", "m", "a"])
    assert torch.equal(A, before)


def test_other_precisions_and_places() -> None:
    model = made(*NAMES)
    check(model, NAMES)
    model.double()
    with torch.no_grad(), lorica.mixed(model, NAMES):
        assert model(torch.randn(5, 6, dtype=torch.float64)).dtype == torch.float64
    model.float()
    check(model, NAMES)


def test_scales_that_differ() -> None:
    model = made("a", "b")
    model[0].scaling["a"] = 7.0
    check(model, ["a", "b"])
    check(model, ["a", "a", "b", "a"])


def test_a_factor_trains_after_inference_mode() -> None:
    model = made(*NAMES)
    with torch.inference_mode(), lorica.mixed(model, NAMES):
        model(torch.randn(5, 6))
    with lorica.active(model, "a"):
        model(torch.randn(2, 6)).sum().backward()
    torch.optim.SGD([factor(model, "a")], lr=1.0).step()
    check(model, NAMES)


def test_how_torch_counts_references() -> None:
    """`blocks` rests on this function of torch's, which is not public."""
    parameter = nn.Parameter(torch.randn(3))
    assert blocks._references(parameter.untyped_storage()) == 2
    alias: Tensor = parameter.detach()
    assert blocks._references(parameter.untyped_storage()) == 3
    del alias
    assert blocks._references(parameter.untyped_storage()) == 2
