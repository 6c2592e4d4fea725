"""Running statistics: the adapter's own while it acts and trains; the base's come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import bits, shake
from torch import Tensor, nn

import lorica
from lorica import LoraConfig
from lorica.errors import AdapterError


def base() -> Any:
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(6), nn.InstanceNorm1d(6, track_running_stats=True)
    return nn.Sequential(nn.Conv1d(4, 6, 1), *norms, nn.Conv1d(6, 3, 1))


def inputs(seed: int = 0) -> Tensor:
    return 3 * torch.randn(16, 4, 5, generator=torch.Generator().manual_seed(seed)) + 1


@torch.no_grad()
def trained(name: str = "one", seed: int = 0, model: Any = None, **fields: Any) -> Any:
    model = base() if model is None else model
    config: Any = {"r": 2, "target_modules": ["0"], **fields}
    lorica.adapt(model, LoraConfig(**config), name)
    for part, parameter in model.named_parameters():
        parameter.requires_grad_(f".{name}" in part)
    shake(model, seed)
    model.train()
    for _ in range(3):
        model(inputs(seed))
    return model.eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model.eval()(inputs())


FORMS: list[dict[str, Any]] = [{}, {"bias": "all"}, {"modules_to_save": ["3"]}, {"use_dora": True}]
MOVED = {
    *(f"{i}.running_{leaf}" for i in "12" for leaf in ("mean", "var")),
    "1.num_batches_tracked",
}


@pytest.mark.parametrize("fields", FORMS)
@pytest.mark.parametrize("trainable", [False, True])
def test_saved_and_loaded_it_computes_the_same(
    tmp_path: Path, fields: dict[str, Any], *, trainable: bool
) -> None:
    model = trained(**fields)
    want = run(model)
    lorica.save(model, tmp_path)
    assert torch.equal(run(lorica.load(base(), tmp_path, trainable=trainable)), want)
    assert set(lorica.extract(model).extras) >= MOVED
    config: Any = {"r": 2, "target_modules": ["0"], **fields}
    other = lorica.adapt(base(), LoraConfig(**config))
    lorica.load_weights(other, tmp_path)
    assert torch.equal(run(other), want)


@pytest.mark.parametrize("fields", FORMS)
def test_detach_gives_the_base_back_bit_for_bit(fields: dict[str, Any]) -> None:
    model, untouched = trained(**fields), base()
    with lorica.disabled(model):
        assert torch.equal(run(model), run(untouched))
    assert not torch.equal(run(model), run(untouched))
    lorica.detach(model)
    assert {k: bits(v) for k, v in model.state_dict().items()} == {
        k: bits(v) for k, v in untouched.state_dict().items()
    }


def test_what_did_not_move_is_not_saved() -> None:
    model = lorica.adapt(base().eval(), LoraConfig(r=2, target_modules=["0"]))
    run(model)
    assert not lorica.extract(model).extras


def test_merged_switched_and_restored() -> None:
    model = trained()
    one = run(model)
    trained("two", 1, model=model)
    two = run(model)
    with lorica.active(model, "one"):
        assert torch.equal(run(model), one)
    lorica.merge(model, "one")
    torch.testing.assert_close(run(model), one, rtol=1e-4, atol=1e-5)
    lorica.switch(model, "two")
    torch.testing.assert_close(run(model), two, rtol=1e-4, atol=1e-5)
    lorica.restore(model)
    assert torch.equal(run(model), two)
    lorica.detach(model)
    assert torch.equal(run(model), run(base()))


@torch.no_grad()
def test_a_model_that_moves_keeps_what_an_adapter_moved() -> None:
    model = trained().double()
    for _ in range(2):
        model.train()(inputs(3).double())
    want = model.eval()(inputs().double())
    other = lorica.attach(base().double(), lorica.extract(model))
    torch.testing.assert_close(other.eval()(inputs().double()), want)
    with lorica.disabled(model):
        pass
    assert torch.equal(model(inputs().double()), want)


def test_two_that_moved_them_do_not_act_together() -> None:
    model = trained()
    lorica.adapt(model, LoraConfig(r=2, target_modules=["3"]), "still")
    alone = run(lorica.active(model, "one") and model)
    for both in (["one", "still"], ["still", "one"]):
        lorica.active(model, both)
        assert torch.equal(run(model), alone)
    trained("two", 1, model=model)
    with pytest.raises(AdapterError, match=r"cannot act together: each brings its own 1\.running"):
        lorica.active(model, ["one", "two"])
    with pytest.raises(AdapterError, match="which cannot differ by row"):
        lorica.mixed(model, ["one", None])
    lorica.mixed(model, ["still", None])


@torch.no_grad()
def test_a_pass_in_training_without_an_adapters_own_moves_nothing() -> None:
    model, untouched = trained(), base()
    lorica.adapt(model, LoraConfig(r=2, target_modules=["3"]), "still")
    lorica.attach(model, lorica.extract(trained()), "frozen")
    lorica.attach(model, lorica.extract(lorica.adapt(base(), LoraConfig(r=2, target_modules=["0"]))), "bare")

    def step() -> Tensor:
        return model.train()(inputs(1)[:2])

    expected = untouched.train()(inputs(1)[:2])
    untouched = base()
    for choice in (
        lambda: lorica.disabled(model),
        lambda: lorica.mixed(model, ["still", None]),
        lambda: lorica.active(model, "bare"),
    ):
        with choice():
            found = {k: bits(v) for k, v in model.state_dict().items() if "running" in k or "num_b" in k}
            step()
            assert {k: bits(v) for k, v in model.state_dict().items() if k in found} == found
    with lorica.disabled(model):
        assert torch.equal(step(), expected)
        assert torch.equal(run(model), run(untouched))
    lorica.detach(model)
    before = {k: bits(v) for k, v in model.state_dict().items()}
    assert before == {k: bits(v) for k, v in base().state_dict().items()}
    step()
    assert {k: bits(v) for k, v in model.state_dict().items()} != before
