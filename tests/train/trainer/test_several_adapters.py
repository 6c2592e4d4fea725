"""Several adapters under a trainer: what trains ends with its own best weights and resumes exactly.

In this library's Trainer, in transformers' own with and without `lorica.peft` around the model, whatever the
adapters are named and in whichever order they came.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dropin import training
from tiny import transformer

import lorica
from lorica.errors import FileError
from lorica.peft import LoraConfig, PeftModel, get_peft_model
from lorica.train import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own future

WAYS = ["native", "native in lorica's", "wrapped"]
NAMES = [("default", "topics"), ("topics", "default"), ("topics", "mood")]
TARGETS = ["q_proj", "v_proj"]


def model_of(way: str, names: tuple[str, ...], trained: tuple[str, ...]) -> Any:
    """A model with adapters of these names, of which some train, and act together with the others."""
    torch.manual_seed(0)
    base = transformer("llama")
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    if way == "wrapped":
        model = get_peft_model(base, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        model.base_model.set_adapter(list(names))
    else:
        model = base
        for i, name in enumerate(names):
            lorica.adapt(base, config, name, seed=i)
        lorica.active(base, names)
    root = base
    for name in names:
        for path, parameter in root.named_parameters():
            if f".{name}." in path:
                parameter.requires_grad_(name in trained)
    return model


def run(way: str, folder: Path, model: Any, **options: Any) -> Any:
    kind = Trainer if way == "native in lorica's" else transformers.Trainer
    args = transformers.TrainingArguments(**training.options(folder, max_steps=4, save_steps=2) | options)
    return kind(model=model, args=args, train_dataset=training.rows(), eval_dataset=training.rows(8))


def values(model: Any) -> dict[str, torch.Tensor]:
    """Adapter's name and tensor → its value."""
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    return {path: p.detach().clone() for path, p in root.named_parameters() if "lora_" in path}


class Keep(transformers.TrainerCallback):
    """The values at the second step, from the run itself."""

    kept: dict[str, torch.Tensor]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 2:
            self.kept = values(model)


# The highest loss counts as the best: the checkpoint at step 2 of 4.
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}


def check_ends_with_the_best(way: str, folder: Path, model: Any, trained: tuple[str, ...]) -> None:
    start, keep = values(model), Keep()
    one = run(way, folder, model, **BEST)
    one.add_callback(keep)
    one.train()
    assert one.state.best_model_checkpoint.endswith("checkpoint-2")
    expected = {path: keep.kept[path] if path.split(".")[-2] in trained else start[path] for path in start}
    assert_equal(values(model), expected)
    moved = [path for path in start if not torch.equal(expected[path], start[path])]
    assert {path.split(".")[-2] for path in moved} == set(trained)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for path in one:
        assert torch.equal(one[path], other[path]), path


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_the_one_that_trains_ends_with_its_best(way: str, names: tuple[str, str], tmp_path: Path) -> None:
    check_ends_with_the_best(way, tmp_path, model_of(way, names, names[1:]), names[1:])


@pytest.mark.parametrize("way", WAYS)
def test_so_does_one_that_came_first(way: str, tmp_path: Path) -> None:
    check_ends_with_the_best(way, tmp_path, model_of(way, NAMES[0], NAMES[0][:1]), NAMES[0][:1])


@pytest.mark.parametrize("way", WAYS)
def test_so_do_several_that_train_at_once(way: str, tmp_path: Path) -> None:
    names, trained = ("topics", "default", "mood"), ("mood", "default")
    check_ends_with_the_best(way, tmp_path, model_of(way, names, trained), trained)


@pytest.mark.parametrize("way", WAYS)
def test_so_does_one_alone_of_any_name(way: str, tmp_path: Path) -> None:
    check_ends_with_the_best(way, tmp_path, model_of(way, ("topics",), ("topics",)), ("topics",))


@pytest.mark.parametrize("names", [*NAMES, ("topics",), ("mood", "topics", "default")])
@pytest.mark.parametrize("way", WAYS)
def test_what_trains_resumes_exactly(way: str, names: tuple[str, ...], tmp_path: Path) -> None:
    trained = names[-2:] if len(names) == 3 else names[-1:]
    whole, again = (model_of(way, names, trained) for _ in range(2))
    run(way, tmp_path, whole).train()
    run(way, tmp_path / "again", again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(values(again), values(whole))
    trains = {n.split(".")[-2] for n, p in again.named_parameters() if "lora_" in n and p.requires_grad}
    assert trains == set(trained)


def test_a_checkpoint_of_other_names_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run("native", tmp_path, model_of("native", ("a", "b"), ("b",))).train()
    other = model_of("native", ("a", "c"), ("c",))
    before = values(other)
    with pytest.raises(FileError, match=r"checkpoint-2 holds no adapter named 'c'.*it holds: 'a', 'b'"):
        run("native", tmp_path / "again", other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(values(other), before)
