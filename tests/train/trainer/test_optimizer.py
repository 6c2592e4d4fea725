from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import transformer
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, get_linear_schedule_with_warmup

import lorica
from lorica import LoraConfig
from lorica.errors import ConfigError
from lorica.train import Prepared, Recipe, fit, parameter_groups, prepare
from lorica.train.trainer.sampler import LengthGroupedSampler


@pytest.fixture
def adapted(tiny_model: Path) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    return lorica.adapt(
        model,
        LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", bias="lora_only"),
        seed=0,
    )


def names_of(model: nn.Module, group: dict[str, list[nn.Parameter]]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_b_trains_faster(adapted: PreTrainedModel) -> None:
    groups = parameter_groups(adapted, lr=1e-3, weight_decay=0.1, loraplus_lr_ratio=16)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-3, 0.1),
        (1e-3, 0.0),
        (1.6e-2, 0.1),
    ]
    slow, undecayed, fast = (names_of(adapted, group) for group in groups)
    assert all(".lora_B." in name for name in fast)
    assert len(fast) == 4
    assert all("bias" in name for name in undecayed)
    assert sum(".lora_A." in name for name in slow) == 4
    assert any("classifier" in name for name in slow)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert slow | undecayed | fast == trainable


def test_norms_do_not_decay(tiny_model: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    decayed, rest = (names_of(model, group) for group in parameter_groups(model, lr=1e-3, weight_decay=0.1))
    assert not any("LayerNorm" in name or "bias" in name for name in decayed)
    assert sum("LayerNorm.weight" in name for name in rest) == 5


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_no_bias_decays(ratio: float | None) -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "recurrent": nn.LSTM(4, 4),
            "head": nn.Linear(4, 2),
        }
    )
    saved = ["attention", "recurrent", "head"]
    config = LoraConfig(r=2, target_modules=["linear"], lora_bias=True, modules_to_save=saved)
    lorica.adapt(model, config, "lora_B")  # a name that is part of others'
    groups = parameter_groups(model, lr=0.1, weight_decay=0.3, loraplus_lr_ratio=ratio)
    rates = {
        name: (entry["lr"], entry["weight_decay"]) for entry in groups for name in names_of(model, entry)
    }
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        is_up = name.startswith("linear.lora_B.")
        expected = 0.1 * (ratio or 1 if is_up else 1), 0.0 if "bias" in name else 0.3
        assert rate == pytest.approx(expected), name


def test_both_factors_of_a_tied_table_have_one_rate_each() -> None:
    model = transformer("llama", tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    lorica.adapt(model, config)
    groups = parameter_groups(model, lr=0.1, loraplus_lr_ratio=4)
    fast = set().union(*(names_of(model, group) for group in groups if group["lr"] == 0.4))
    assert {name.split(".")[-3 if name.endswith("weight") else -2] for name in fast} == {
        "lora_B",
        "lora_embedding_B",
    }


@pytest.mark.parametrize("ratio", [None, 1.0])
def test_a_ratio_of_one_is_plain_adamw_bit_for_bit(adapted: PreTrainedModel, ratio: float | None) -> None:
    plain = copy.deepcopy(adapted)
    batch = {"input_ids": torch.arange(4, 12).reshape(2, 4), "labels": torch.tensor([0, 1])}
    optimizers = {
        adapted: torch.optim.AdamW(parameter_groups(adapted, lr=1e-2, loraplus_lr_ratio=ratio), lr=1e-2),
        plain: torch.optim.AdamW(
            [p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
        ),
    }
    for model, optimizer in optimizers.items():
        model.eval()
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(adapted.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_cannot_be_grouped(tiny_model: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    with pytest.raises(ConfigError, match="needs a LoRA adapter"):
        parameter_groups(model, lr=1e-3, loraplus_lr_ratio=4)
    with pytest.raises(ConfigError, match="no parameter of the model trains"):
        parameter_groups(model.requires_grad_(False), lr=1e-3)


def bare_loop(prepared: Prepared, model: PreTrainedModel, *, accelerated: bool) -> list[float]:
    """The losses of one epoch, by a loop that anybody would write."""
    training = prepared.recipe.training
    rows = prepared.splits["train"].features
    sampler = LengthGroupedSampler(rows["length"], training.batch_size, training.seed)
    loader = torch.utils.data.DataLoader(
        rows.remove_columns("length"),  # type: ignore[arg-type]
        training.batch_size,
        sampler=sampler,
        collate_fn=prepared.task.collator(prepared.tokenizer),
    )
    assert training.learning_rate is not None
    groups = parameter_groups(model, lr=training.learning_rate, loraplus_lr_ratio=training.loraplus_lr_ratio)
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    accelerator = Accelerator(cpu=True) if accelerated else None
    if accelerator is not None:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses: list[float] = []
    for batch in loader:
        loss = model(**batch).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("ratio", [None, 4.0])
def test_three_loops_give_one_curve(
    make_recipe: Callable[..., Recipe], tmp_path: Path, ratio: float | None
) -> None:
    recipe = make_recipe(epochs=1, logging_steps=1, warmup_ratio=0.0, loraplus_lr_ratio=ratio)
    curves = []
    for loop in ("trainer", "accelerate", "torch"):
        prepared = prepare(recipe)
        # Dropout would ask the three for the same calls to the random generator, which loaders also draw
        # from.
        for module in prepared.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model = lorica.adapt(
            prepared.model, recipe.method.replace(task_type="SEQ_CLS", lora_dropout=0.0), seed=0
        )
        if loop == "trainer":
            done = fit(
                model,
                prepared.task,
                prepared.tokenizer,
                prepared.splits["train"].features,
                None,
                recipe.training,
                tmp_path,
            )
            curves.append([entry["loss"] for entry in done.history if "loss" in entry])
        else:
            curves.append(bare_loop(prepared, model, accelerated=loop == "accelerate"))
    assert len(curves[0]) == 10
    assert curves[1] == curves[2]
    assert curves[0] == pytest.approx(curves[2], abs=1e-6)
