"""A wrapped model in transformers' Trainer: trained, resumed, brought back to its best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from tiny import VOCABULARY, transformer

from lorica.peft import LoraConfig, PeftModel, get_peft_model


def rows(count: int = 32) -> Dataset:
    """Sentences of a language of forty words."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCABULARY, (count, 8), generator=draw).tolist()
    return Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 8] * count, "labels": tokens})


def model(**settings: Any) -> PeftModel:
    """A tiny language model with dropout in its adapter."""
    torch.manual_seed(0)
    config = LoraConfig(
        **{"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        | settings
    )
    return get_peft_model(transformer("llama"), config)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """Eight steps, a checkpoint every four."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "report_to": "none",
        **more,
    }


def trainer(folder: Path, **more: Any) -> transformers.Trainer:
    """transformers' own Trainer."""
    args = transformers.TrainingArguments(**options(folder, **more))
    return transformers.Trainer(model=model(), args=args, train_dataset=rows(), eval_dataset=rows(8))


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    """What a checkpoint holds."""
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_resumes(make: Any, folder: Path) -> None:
    """A run that resumes half-way ends with the bits of one that never stopped."""
    make(folder / "whole").train()
    half, end = folder / "whole" / "checkpoint-4", folder / "whole" / "checkpoint-8"
    assert not (half / "model.safetensors").exists()
    assert not same(weights(half), weights(end))
    again = make(folder / "again")
    again.train(resume_from_checkpoint=str(half))
    assert again.state.global_step == 8
    assert same(weights(folder / "again" / "checkpoint-8"), weights(end))


def check_ends_with_the_best(make: Any, folder: Path) -> None:
    """After training the model holds the best checkpoint, an early one: the highest loss is best."""
    each = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    run = make(
        folder, **each, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("checkpoint-8")
    run.model.save_pretrained(folder / "final")
    assert same(weights(folder / "final"), weights(best))
    assert any(parameter.requires_grad for parameter in run.model.parameters())
