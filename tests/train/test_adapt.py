"""Starts from data in a run: lorica's own functions on training rows, once, and resumed to the bit."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from train import tiny

import lorica
from lorica.adapter import Adapter
from lorica.cli import main
from lorica.config import CordaConfig, EvaConfig, LoraConfig
from lorica.errors import AdapterError, ConfigError, FileError, LoricaError
from lorica.model import starts
from lorica.train import Recipe, prepare, train
from lorica.train import adapt as beginning
from lorica.train.adapt import warm_start

METHODS: dict[str, dict[str, Any]] = {
    "eva": {"eva_config": EvaConfig(tau=0.8)},
    "corda": {"corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data")
    return folder


def recipe(place: Path, start: str, output: Path, **training: Any) -> Recipe:
    base = tiny.recipe(place / "model", place / "data", output, start_batches=3, **training)
    method = dataclasses.replace(base.method, init_lora_weights=start, **METHODS[start])
    return dataclasses.replace(base, method=method)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    return adapter.named_tensors()


@pytest.mark.parametrize("start", METHODS)
def test_the_start_is_made_from_training_rows(start: str, place: Path, tmp_path: Path) -> None:
    """By lorica's own functions, on rows drawn here once more."""
    chosen = recipe(place, start, tmp_path / "out")
    method = dataclasses.replace(chosen.method, task_type="SEQ_CLS")
    console = quiet()
    found = beginning.adapt_from_rows(
        prepare(chosen), method, tmp_path / "out", resume=False, console=console
    )
    assert isinstance(console.file, io.StringIO)
    assert f"{start}: started from 12 training rows" in console.file.getvalue()

    prepared = prepare(chosen)
    rows, collate = prepared.splits["train"].features, prepared.task.collator(prepared.tokenizer)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()[:12]
    columns = [name for name in rows.column_names if name in ("input_ids", "attention_mask", "labels")]
    picked = [{name: rows[i][name] for name in columns} for i in order]
    batches = [collate(picked[i : i + 4]) for i in range(0, 12, 4)]
    model = prepared.model
    if start == "eva":
        starts.initialize_lora_eva_weights(lorica.adapt(model, method, seed=0), batches)
    else:
        {"corda": starts.preprocess_corda, "lora_ga": starts.preprocess_loraga}[start](model, method, batches)
        lorica.adapt(model, method, seed=0)
    ours, theirs = tensors(lorica.extract(found)), tensors(lorica.extract(model))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5)
    assert lorica.adapters(found) == lorica.adapters(model)


@pytest.mark.parametrize("start", METHODS)
def test_a_resumed_run_ends_the_same_and_looks_once(
    start: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(place, start, tmp_path / "run"), console=quiet())
    cut = whole.output
    shutil.rmtree(cut / "checkpoints" / "checkpoint-20")
    (cut / "adapter_model.safetensors").unlink()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the rows were looked at again")

    for name in ("look_for_corda", "look_for_loraga", "initialize_lora_eva_weights"):
        monkeypatch.setattr(beginning, name, never)
    resumed = train(recipe(place, start, cut), resume=True, console=quiet())
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert resumed.metrics == whole.metrics


def test_resumed_before_the_first_checkpoint_it_starts_again(place: Path, tmp_path: Path) -> None:
    whole = train(recipe(place, "corda", tmp_path / "run"), console=quiet())
    shutil.rmtree(whole.output / "checkpoints")
    (whole.output / "adapter_model.safetensors").unlink()
    resumed = train(recipe(place, "corda", whole.output), resume=True, console=quiet())
    assert resumed.adapter_sha256 == whole.adapter_sha256


def test_on_the_command_line_and_in_the_file(place: Path, tmp_path: Path) -> None:
    options = {
        "model": place / "model",
        "data.train": place / "data",
        "output": tmp_path / "out",
        "method.init_lora_weights": "eva",
        "method.eva_config": '{"rho": 1.5, "tau": 0.8}',
        "method.r": 2,
        "training.max_steps": 2,
        "training.batch_size": 4,
        "training.start_batches": 2,
        "training.report_to": "[]",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["train", *flags]) == 0
    saved = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert saved.method.eva_config == EvaConfig(rho=1.5, tau=0.8)
    assert saved.training.start_batches == 2
    adapter = lorica.read(tmp_path / "out")
    assert isinstance(adapter.config, LoraConfig)
    assert adapter.config.init_lora_weights == "eva"


def test_a_start_that_cannot_be_made_leaves_no_run_behind(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, "lora_ga", tmp_path / "out")
    method = dataclasses.replace(chosen.method, r=200)
    with pytest.raises(LoricaError, match="needs 400 directions"):
        train(dataclasses.replace(chosen, method=method), console=quiet())
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_how_many_batches_must_be_more_than_none() -> None:
    with pytest.raises(ConfigError, match="start_batches must be more than 0"):
        tiny.recipe(Path("m"), Path("d"), Path("o"), start_batches=0)


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
