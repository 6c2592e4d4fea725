from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train import tiny

import lorica
from lorica.errors import AdapterError, ConfigError, FileError
from lorica.train import Recipe, prepare, train
from lorica.train.adapt import warm_start


@pytest.fixture
def first(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    return train(make_recipe(max_steps=4).replace(output=str(tmp_path / "first"))).output


def started(recipe: Recipe, directory: Path, *, head: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter of a new model before and after it took over another's weights."""
    model = lorica.adapt(prepare(recipe).model, recipe.method.replace(task_type="SEQ_CLS"), seed=9)
    copy = lambda: {name: tensor.clone() for name, tensor in lorica.extract(model).named_tensors().items()}  # noqa: E731
    before = copy()
    warm_start(model, lorica.read(directory), head=head)
    return before, copy()


@pytest.mark.parametrize("head", [False, True])
def test_the_weights_are_taken_and_the_head_if_wanted(
    make_recipe: Callable[..., Recipe], first: Path, head: bool
) -> None:
    before, after = started(make_recipe(seed=5), first, head=head)
    theirs = lorica.read(first).named_tensors()
    assert before.keys() == after.keys() == theirs.keys()
    for name, tensor in after.items():
        own = "classifier" in name and not head
        assert torch.equal(tensor, before[name] if own else theirs[name]), name
    assert any("classifier" in name for name in after)


def test_a_run_begins_with_another_adapter(
    make_recipe: Callable[..., Recipe], first: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(max_steps=2, learning_rate=1e-12, load_best=False)
    output = train(recipe.replace(init_from=str(first), init_head=True)).output
    one, other = lorica.read(output).named_tensors(), lorica.read(first).named_tensors()
    assert all(torch.allclose(one[name], other[name], atol=1e-9) for name in other)
    assert Recipe.load(output / "recipe.yaml").init_from == str(first)


def test_what_cannot_be_begun_with(make_recipe: Callable[..., Recipe], first: Path, tmp_path: Path) -> None:
    recipe = make_recipe(max_steps=1).replace(init_from=str(first))
    cases: list[tuple[Any, str]] = [
        ({"lora_alpha": 8.0}, r"has another scale in .*\(2, here 4\).*method.lora_alpha"),
        ({"r": 4, "lora_alpha": 8.0}, "shape of"),
        ({"target_modules": ["query"]}, "unexpected"),
    ]
    for method, message in cases:
        with pytest.raises(AdapterError, match=message):
            train(recipe.replace(method=method))
    three = tiny.write_rows(
        tmp_path / "rows.jsonl", [{"text": "film", "label": str(i % 3)} for i in range(12)]
    )
    with pytest.raises(AdapterError, match="leave init_head off"):
        train(recipe.replace(init_head=True, data={"train": str(three)}))
    train(recipe.replace(data={"train": str(three)}, output=str(tmp_path / "three")))
    with pytest.raises(FileError, match="nowhere"):
        train(recipe.replace(init_from=str(tmp_path / "nowhere"), output=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="init_head must be False without init_from"):
        make_recipe().replace(init_head=True)
