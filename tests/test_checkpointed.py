"""Gradient checkpointing: a block computed anew computes with the adapters of its first pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import Toy, shake, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lorica
from lorica import LoraConfig
from lorica.errors import StateError

KINDS = pytest.mark.parametrize("reentrant", [False, True])
CHOICES: dict[str, Callable[[Any], Any]] = {
    "two": lambda model: lorica.active(model, "two"),
    "both": lambda model: lorica.active(model, ["one", "two"]),
    "none": lorica.disabled,
    "mixed": lambda model: lorica.mixed(model, ["one", None, "two"]),
}


def adapted(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = Toy()
    for name in ("one", "two"):
        lorica.adapt(model, LoraConfig(r=2, target_modules=["up", "down"], **fields), name)
    shake(model)
    lorica.active(model, "one")
    return model.train()


def loss_of(
    model: Any, *, reentrant: bool | None, inner: Callable[[Any], Any] = contextlib.nullcontext
) -> Tensor:
    """A loss whose blocks are checkpointed, or for None are not."""

    def block(parts: Any, x: Tensor) -> Tensor:
        with inner(model):
            y = parts["down"](torch.tanh(parts["up"](x)))
        return x + parts["down"](torch.tanh(parts["up"](y)))

    x = model.embed(tokens()).detach().requires_grad_()
    for parts in model.blocks:
        x = block(parts, x) if reentrant is None else checkpoint(block, parts, x, use_reentrant=reentrant)
    return model.head(model.norm(x).mean(1)).square().sum()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_backward_pass_outside_the_block(choice: str, dropout: float, reentrant: bool) -> None:
    model = adapted(lora_dropout=dropout)
    torch.manual_seed(1)
    with CHOICES[choice](model):
        loss_of(model, reentrant=None).backward()
    want = gradients(model)
    torch.manual_seed(1)
    with CHOICES[choice](model):
        loss = loss_of(model, reentrant=reentrant)
    with lorica.disabled(model), torch.no_grad():
        loss_of(model, reentrant=None)  # an evaluation in between, of the base
    lorica.active(model, "one")
    loss.backward()
    assert choice == "none" or want
    torch.testing.assert_close(gradients(model), want)


@KINDS
def test_a_backward_pass_in_another_thread(reentrant: bool) -> None:
    model = adapted()
    with lorica.active(model, "two"):
        loss_of(model, reentrant=None).backward()
    want = gradients(model)

    def forward() -> Tensor:
        with lorica.active(model, "two"):
            return loss_of(model, reentrant=reentrant)

    with ThreadPoolExecutor(1) as pool:
        loss = pool.submit(forward).result()
    loss.backward()
    torch.testing.assert_close(gradients(model), want)


@KINDS
def test_a_block_that_chooses_by_itself(reentrant: bool) -> None:
    model = adapted()
    loss_of(model, reentrant=None, inner=lorica.disabled).backward()
    want = gradients(model)
    loss_of(model, reentrant=reentrant, inner=lorica.disabled).backward()
    torch.testing.assert_close(gradients(model), want)
    loss = loss_of(model, reentrant=reentrant, inner=lorica.disabled)
    lorica.active(model, "two")
    with pytest.raises(StateError, match=r"\('one',\).*and now \('two',\).*call backward inside"):
        loss.backward()


@KINDS
def test_parameters_of_the_base_that_were_exchanged(reentrant: bool) -> None:
    model = adapted()
    lorica.adapt(model, LoraConfig(r=2, target_modules=["up"], bias="all"), "biased")
    lorica.active(model, "one")
    with lorica.active(model, "biased"):
        loss = loss_of(model, reentrant=reentrant)
    with pytest.raises(StateError, match="call backward inside"):
        loss.backward()


def test_what_torch_calls_the_things_that_are_looked_at() -> None:
    """Where torch renames them, the tests above fail; here is what failed."""
    found: list[Any] = []

    def block(x: Tensor) -> Tensor:
        autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
        found.append(autograd._top_saved_tensors_default_hooks(True)[0])
        return x.sin()

    checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert [hook.__module__ for hook in found] == ["torch.utils.checkpoint"] * 2


def test_before_torch_tells_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lorica.functional, lorica.choice):
        monkeypatch.setattr(module, "saving_hooks", lambda _: None)
    model = adapted(lora_dropout=0.5)
    found = []
    for reentrant in (None, False):
        torch.manual_seed(1)
        with lorica.active(model, "two"):
            loss_of(model, reentrant=reentrant).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
