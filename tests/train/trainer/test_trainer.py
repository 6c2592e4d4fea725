from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from train import tiny
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

import lorica
from lorica import LoraConfig
from lorica.errors import LoricaError
from lorica.train import LoraTrainerMixin, Trainer


class Mixed(LoraTrainerMixin, transformers.Trainer):
    pass


def rows() -> Dataset:
    encoded = tiny.tokenizer()([row["text"] for row in tiny.sentences(32)])
    return Dataset.from_dict({**encoded, "labels": [i % 2 for i in range(32)]})


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        **options,
    }
    return TrainingArguments(**values)


def classifier(model: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model)
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", task_type="SEQ_CLS")
    return lorica.adapt(base, config, seed=0)


def trainer(
    kind: type[transformers.Trainer], model: Path, folder: Path, **options: Any
) -> transformers.Trainer:
    return kind(
        model=classifier(model),
        args=arguments(folder, **options),
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=tiny.tokenizer(),
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [Trainer, Mixed])
def test_resumes_bit_for_bit_from_an_adapter_only_checkpoint(
    kind: type[transformers.Trainer], tiny_model: Path, tmp_path: Path
) -> None:
    trainer(kind, tiny_model, tmp_path / "whole").train()
    assert not (tmp_path / "whole" / "checkpoint-4" / "model.safetensors").exists()
    again = trainer(kind, tiny_model, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.state.global_step == 8
    assert_same(weights(tmp_path / "again" / "checkpoint-8"), weights(tmp_path / "whole" / "checkpoint-8"))


@pytest.mark.parametrize("kind", [Trainer, Mixed])
def test_ends_with_the_best_checkpoint(
    kind: type[transformers.Trainer], tiny_model: Path, tmp_path: Path
) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }
    # The highest loss counts as the best, so that the best checkpoint is not the last one.
    one: Any = trainer(kind, tiny_model, tmp_path, metric_for_best_model="loss", **options)
    one.train()
    best = one.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("checkpoint-8")
    lorica.save(one.model, tmp_path / "final")
    assert_same(weights(tmp_path / "final"), weights(Path(best)))
    assert any(parameter.requires_grad for parameter in one.model.parameters())


def test_a_model_without_adapters_takes_the_trainers_own_ways(tiny_model: Path, tmp_path: Path) -> None:
    def make(folder: Path) -> Trainer:
        torch.manual_seed(0)
        return Trainer(
            model=AutoModelForSequenceClassification.from_pretrained(tiny_model),
            args=arguments(folder, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True),
            train_dataset=rows(),
            eval_dataset=rows(),
            data_collator=DataCollatorWithPadding(tiny.tokenizer()),
        )

    make(tmp_path / "whole").train()
    make(tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    last = [load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("whole", "again")]
    assert_same(*last)


def test_loraplus_reaches_the_optimizer(tiny_model: Path, tmp_path: Path) -> None:
    one = Trainer(
        model=classifier(tiny_model), args=arguments(tmp_path), train_dataset=rows(), loraplus_lr_ratio=8.0
    )
    assert sorted({group["lr"] for group in one.create_optimizer().param_groups}) == [1e-2, 8e-2]


def test_a_trainer_that_would_not_call_the_mixin_is_refused() -> None:
    with pytest.raises(
        LoricaError, match=r"Wrong cannot load adapters: Trainer comes before LoraTrainerMixin"
    ):

        class Wrong(transformers.Trainer, LoraTrainerMixin):  # type: ignore[misc]  # the wrong way round
            pass

    class Other:
        def _load_best_model(self) -> None: ...

    with pytest.raises(LoricaError, match=r"Other of transformers .* has no _load_from_checkpoint"):

        class Newer(LoraTrainerMixin, Other):  # type: ignore[misc]
            pass


def test_sft_trainer_resumes_and_ends_with_the_best(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl", reason="needs trl, which comes with lorica[peers]")

    class SFT(LoraTrainerMixin, trl.SFTTrainer):
        pass

    def make(folder: Path) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
        tokenizer = tiny.tokenizer()
        tokenizer.eos_token = "[SEP]"
        model = lorica.adapt(
            LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), seed=0
        )
        options = {
            "eval_strategy": "steps",
            "eval_steps": 4,
            "load_best_model_at_end": True,
            "max_length": 16,
            "gradient_checkpointing": False,
        }
        data = Dataset.from_list([{"text": row["text"]} for row in tiny.sentences(32)])
        args = trl.SFTConfig(**{**arguments(folder).to_dict(), **options, "bf16": False})
        return SFT(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)

    make(tmp_path / "whole").train()
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(weights(tmp_path / "again" / "checkpoint-8"), weights(tmp_path / "whole" / "checkpoint-8"))
    lorica.save(again.model, tmp_path / "final")
    assert_same(weights(tmp_path / "final"), weights(Path(again.state.best_model_checkpoint)))


def test_of_evaluations_that_tie_the_one_with_the_lower_loss_is_the_best(
    tiny_model: Path, tmp_path: Path
) -> None:
    scores = itertools.chain([(0.5, 0.9), (0.75, 0.8), (0.75, 0.6)], itertools.repeat((0.75, 0.7)))

    class Told(Trainer):
        def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
            accuracy, loss = next(scores)
            metrics = {"eval_accuracy": accuracy, "eval_loss": loss}
            self.log(dict(metrics))
            return metrics

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    one: Any = trainer(
        Told, tiny_model, tmp_path, metric_for_best_model="accuracy", load_best_model_at_end=True, **options
    )
    one.train()
    assert one.state.best_global_step == 6
    assert one.state.best_metric == 0.75
    assert one.state.best_model_checkpoint.endswith("checkpoint-6")
