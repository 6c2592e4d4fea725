"""Adapted layers that a whole pass of the model never called are named, once."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from tiny import Toy, record
from torch import Tensor, nn

import lorica
from lorica.errors import LoricaWarning


class Partly(nn.Module):
    """A model with layers that it calls, one that it never calls, and one that it calls at times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"a": nn.Linear(4, 4), "idle": nn.Linear(4, 4)}) for _ in range(3)
        )
        self.image = nn.Linear(4, 4)

    def forward(self, x: Tensor, image: Tensor | None = None, *, fail: bool = False, skip: int = 9) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = x if i == skip else x + block["a"](x)  # pyright: ignore[reportIndexIssue]
        if fail:
            raise RuntimeError("out of memory")
        return x if image is None else x + self.image(image)


X = torch.ones(2, 4)


def adapted(*targets: str) -> Partly:
    return lorica.adapt(Partly(), lorica.LoraConfig(r=2, target_modules=list(targets)), seed=0)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_layer_that_is_never_called_is_named_once() -> None:
    model = adapted("a", "idle")
    with pytest.warns(
        LoricaWarning, match=r"did not call blocks\.0\.idle, blocks\.1\.idle, blocks\.2\.idle:"
    ):
        model(X)
    assert not hooks(model)
    model(X)
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["a", "idle", "image"]), "other")
    with pytest.warns(LoricaWarning, match=r"did not call image:"):
        model(X)


def test_a_block_that_is_left_out_is_no_sign() -> None:
    model = adapted("a")
    model(X, skip=1)
    assert not hooks(model)


def test_a_pass_that_fails_says_nothing_and_the_next_is_watched() -> None:
    model = adapted("a", "idle")
    with pytest.raises(RuntimeError, match="out of memory"):
        model(X, fail=True)
    assert hooks(model) == 1
    with pytest.warns(LoricaWarning, match="idle"):
        model(X)


def test_all_called_says_nothing_and_leaves_nothing() -> None:
    model = Toy()
    before = record(model)
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["up", "down"]))
    assert hooks(model) == 1
    model(torch.ones(1, 3, dtype=torch.long))
    assert not hooks(model)
    lorica.detach(model)
    assert record(model) == before
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["up"]))
    lorica.detach(model)
    assert not hooks(model)


def test_copies_and_pickles_are_watched_by_themselves() -> None:
    model = adapted("a", "idle")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(LoricaWarning, match="idle"):
            twin(X)
    assert hooks(model) == 1


@pytest.mark.parametrize("how", ["compile", "trace"])
def test_other_ways_to_run_it_are_left_alone(how: str) -> None:
    model = adapted("a").eval()
    lorica.disabled(model)  # what checks shapes in the tests cannot be compiled
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        run: Any = (
            torch.compile(model, backend="eager", fullgraph=True)
            if how == "compile"
            else torch.jit.trace(model, X)
        )
        assert torch.equal(run(X), model(X))


def test_parts_that_a_pass_is_given_ready_made_are_not_missed() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["q", "v"]))
    ids = torch.ones(1, 3, dtype=torch.long)
    model.generate(input_ids=ids, max_new_tokens=2, decoder_start_token_id=0)
    model(input_ids=ids, decoder_input_ids=ids)
    assert not any(hook.__name__ == "_begin" for hook in model._forward_pre_hooks.values())
