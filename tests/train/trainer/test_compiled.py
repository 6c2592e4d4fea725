"""A training by compiled products comes to what torch's own come to, however it is arranged."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from rich.console import Console
from safetensors.torch import load_file
from tiny import transformer
from torch import Tensor
from train.compiled import CALLS, kernels, trained

import lorica
from lorica.kernels import thin
from lorica.train import Recipe
from lorica.tune import Population

pytestmark = pytest.mark.skipif(thin.load() is None, reason="needs a C compiler, and OpenMP under torch")

Make = Callable[..., Recipe]

ARRANGED: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "compiled": {"arguments": {"torch_compile": True, "torch_compile_backend": "eager"}},
}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(
            ours[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda said, key=key: f"{key}: {said}"
        )


def few(make_recipe: Make, folder: Path, **training: Any) -> Recipe:
    """Four steps with dropout, whose size follows the gradients'."""
    made = make_recipe(max_steps=4, load_best=False, learning_rate=0.1, **training)
    arguments = {"optim": "sgd", **made.training.arguments}
    return made.replace(output=str(folder), training={"arguments": arguments})


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("how", ARRANGED)
def test_in_one_process(how: str, make_recipe: Make, tmp_path: Path) -> None:
    found, calls = trained(few(make_recipe, tmp_path / "with", **ARRANGED[how]), used=True)
    wanted, none = trained(few(make_recipe, tmp_path / "without", **ARRANGED[how]), used=False)
    assert not none
    # torch's compiler sees plain operations; what is scored after training is not compiled.
    assert calls.keys() == ({"down", "up"} if how == "compiled" else {*CALLS})
    assert_alike(found, wanted)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_in_two_processes(engine: str, make_recipe: Make, tmp_path: Path) -> None:
    found, wanted = (
        on_ranks(in_each, few(make_recipe, tmp_path / str(used), batch_size=2), engine, used)
        for used in (True, False)
    )
    for (ours, calls), (theirs, none) in zip(found, wanted, strict=True):
        assert (calls.keys(), none) == ({*CALLS}, {})
        assert_alike(ours, theirs)


def in_each(recipe: Recipe, engine: str, used: bool) -> Any:
    return trained(recipe, engine, used=used)


def test_side_by_side(make_recipe: Make, tmp_path: Path) -> None:
    pytest.importorskip("greenlet", reason="needs lorica[tune]")
    one = few(make_recipe, tmp_path)
    recipes = {
        "one": one,
        "wider": one.replace(method={"r": 8}, training={"seed": 1}),
        "fewer": one.replace(method={"target_modules": ["query", "value"]}),
    }
    folders = {}
    for used in (True, False):
        with kernels(used=used) as calls:
            found = Population(recipes, tmp_path / str(used), slots=3, console=Console(file=io.StringIO()))
            found.run()
        assert bool(calls) is used
        folders[used] = {name: found.folder(name) / "adapter_model.safetensors" for name in recipes}
    for name in recipes:
        assert_alike(load_file(folders[True][name]), load_file(folders[False][name]))


def test_the_rows_of_a_mixture_are_those_of_each_adapter_alone() -> None:
    """A mixture is computed by torch's own products, as rows have factors of their own."""
    torch.manual_seed(0)
    model = transformer("llama")
    for name, r in (("one", 2), ("other", 4)):
        config = lorica.LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False)
        lorica.adapt(model, config, name=name)
    ids, names = torch.arange(48).view(4, 12) % 40, ["one", "other", "other", "one"]

    def taken() -> dict[str, Tensor]:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    with kernels(used=True) as calls, lorica.mixed(model, names):
        together = model(ids).logits
        together.square().sum().backward()
    assert not calls
    mixed = taken()
    alone: dict[str, Tensor] = {}
    for name in ("one", "other"):
        rows = [row for row, own in enumerate(names) if own == name]
        with kernels(used=True) as calls, lorica.active(model, name):
            logits = model(ids[rows]).logits
            logits.square().sum().backward()
        assert calls.keys() == {*CALLS}
        torch.testing.assert_close(logits, together[rows], rtol=1e-4, atol=1e-5)
        alone |= taken()
    assert_alike(mixed, alone)
