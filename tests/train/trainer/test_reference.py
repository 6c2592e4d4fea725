"""TRL's trainers which want a reference model: the adapter's own start, on the one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import transformer
from torch import nn
from train import tiny

import lorica
from lorica.errors import LoricaError, StateError
from lorica.model.pretrained.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and TRL warn of their own future


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'lorica[peers]'")
    from transformers import PreTrainedModel

    def second(*args: Any, **options: Any) -> None:
        raise AssertionError("a second base is loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", second)
    return trl


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A trained adapter: its B is not zero."""
    model = transformer("llama")
    lorica.adapt(
        model,
        lorica.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, init_lora_weights=False
        ),
        seed=1,
    )
    return lorica.save(model, tmp_path / "start")


def policy(start: Path, name: str = "default") -> Any:
    torch.manual_seed(0)
    model: Any = transformer("llama")
    model.config._name_or_path = "a/base"
    return lorica.load(model, start, name, trainable=True)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }


def tokenizer() -> Any:
    result = tiny.tokenizer()
    result.eos_token = "[SEP]"
    return result


def pairs() -> Dataset:
    row = {"prompt": "lovely film", "chosen": " great story", "rejected": " poor plot"}
    return Dataset.from_list([row, {**row, "chosen": " warm voice"}] * 4)


def dpo(trl: Any, folder: Path, model: Any, **more: Any) -> Any:
    args = trl.DPOConfig(**options(folder, max_length=16, **more))
    return trl.DPOTrainer(model=model, args=args, train_dataset=pairs(), processing_class=tokenizer())


def kto(trl: Any, folder: Path, model: Any, **more: Any) -> Any:
    row = {"prompt": "lovely film", "completion": " great story", "label": True}
    rows = [row, {**row, "completion": " poor plot", "label": False}] * 4
    args = trl.KTOConfig(**options(folder, max_length=16, **more))
    return trl.KTOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )


def group(kind: str) -> Any:
    def make(trl: Any, folder: Path, model: Any, **more: Any) -> Any:
        given = options(
            folder, per_device_train_batch_size=4, num_generations=4, beta=0.1, disable_dropout=True
        )
        args = getattr(trl, f"{kind}Config")(**given | {"max_completion_length": 4} | more)
        return getattr(trl, f"{kind}Trainer")(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "lovely film"}] * 8),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            processing_class=tokenizer(),
        )

    return make


MAKERS = {"dpo": dpo, "kto": kto, "grpo": group("GRPO"), "rloo": group("RLOO")}
AT_START = {"dpo": "rewards/margins", "kto": "rewards/chosen", "grpo": "kl", "rloo": "kl"}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_reference_is_the_adapters_own_start(kind: str, trl: Any, start: Path, tmp_path: Path) -> None:
    model = policy(start, "of-mine")
    run = MAKERS[kind](trl, tmp_path / kind, model)
    run.train()
    logged = [entry for entry in run.state.log_history if AT_START[kind] in entry]
    assert logged[0][AT_START[kind]] == pytest.approx(0.0, abs=1e-6)
    assert logged[1][AT_START[kind]] != 0.0


def test_it_answers_as_the_start_did_after_any_training(trl: Any, start: Path, tmp_path: Path) -> None:
    model = policy(start)
    run = dpo(trl, tmp_path, model)
    run.train()
    tokens = torch.tensor([[3, 4, 5, 6]])
    expected = policy(start).eval()(tokens).logits
    model.train()
    assert torch.equal(run.ref_model(tokens).logits, expected)
    assert all(module.training for module in model.modules())
    assert not torch.allclose(model.eval()(tokens).logits, expected)
    assert not list(run.ref_model.parameters())
    assert list(lorica.adapters(model)) == ["default"]


def test_a_fresh_adapters_reference_is_the_base(trl: Any, tmp_path: Path) -> None:
    model: Any = transformer("llama")
    model.config._name_or_path = "a/base"
    base = model.eval()(torch.tensor([[3, 4, 5]])).logits
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    run = dpo(trl, tmp_path, model)
    run.train()
    torch.testing.assert_close(run.ref_model(torch.tensor([[3, 4, 5]])).logits, base)


def test_a_reference_that_would_move_is_refused(trl: Any, start: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="DPOTrainer would move the reference model's weights"):
        dpo(trl, tmp_path, policy(start), sync_ref_model=True)


def test_another_path_is_a_model_of_its_own(trl: Any, start: Path) -> None:
    from trl.trainer import dpo_trainer

    class Trainer:
        def __init__(self, model: Any) -> None:
            self.model = model
            self.teacher = dpo_trainer.create_model_from_path("another/base")

    with pytest.raises(OSError, match="huggingface"):
        Trainer(policy(start))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.linear(x))


def test_a_waiting_backward_pass_is_not_disturbed() -> None:
    model = lorica.adapt(Small(), lorica.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    x = torch.randn(4, 3)
    model.drop.p = 0.0
    reference = Reference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)

    def gradients(look: bool) -> list[torch.Tensor | None]:
        model.zero_grad()
        loss = model(x).square().sum()
        if look:
            reference(x)
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)  # type: ignore[arg-type]
    assert reference(x).requires_grad is False


def test_a_model_whose_trained_parameters_changed_shape_is_refused() -> None:
    model: Any = lorica.adapt(Small(), lorica.LoraConfig(r=2, target_modules=["linear"]))
    reference = Reference(model)
    model.linear.lora_A.default.weight.data = torch.zeros(1, 3)
    with pytest.raises(StateError, match=r"of shape \(2, 3\) when the reference model was made"):
        reference(torch.randn(4, 3))
