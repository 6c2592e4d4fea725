"""Parameter counts, against figures that documents quote of full-sized models; nothing is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Toy
from torch import nn

import lorica


def model_of(config: str, model: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**settings))


def count(model: nn.Module, **settings: Any) -> lorica.ParameterCount:
    return lorica.trainable_parameters(lorica.adapt(model, lorica.LoraConfig(**settings)))


def test_distilbert_with_its_head() -> None:
    model = model_of("DistilBertConfig", "DistilBertForSequenceClassification")
    counted = count(model, r=8, target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS")
    assert str(counted) == "trainable params: 739,586 || all params: 67,694,596 || trainable%: 1.0925"


def test_vit_with_its_head_by_both_conventions() -> None:
    model = model_of("ViTConfig", "ViTForImageClassification", num_labels=101)
    counted = count(model, r=16, modules_to_save=["classifier"])
    assert str(counted) == "trainable params: 667,493 || all params: 86,543,818 || trainable%: 0.7713"
    assert counted.deployed == 86_466_149


def test_mt0_large() -> None:
    model = model_of(
        "MT5Config",
        "MT5ForConditionalGeneration",
        d_model=1024,
        d_ff=2816,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=16,
    )
    assert count(model, r=8, task_type="SEQ_2_SEQ_LM").trainable == 2_359_296


def test_opt_350m() -> None:
    model = model_of(
        "OPTConfig",
        "OPTForCausalLM",
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    )
    counted = count(model, r=16, task_type="CAUSAL_LM")
    assert str(counted) == "trainable params: 1,572,864 || all params: 332,769,280 || trainable%: 0.4727"


@pytest.mark.parametrize(
    ("size", "trainable"),
    [
        ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, 393_216),
        ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, 737_280),
    ],
)
def test_gpt2_fused_attention(size: dict[str, int], trainable: int) -> None:
    assert count(model_of("GPT2Config", "GPT2LMHeadModel", **size), r=4).trainable == trainable


def test_a_model_without_adapters() -> None:
    model = Toy()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert lorica.trainable_parameters(model) == lorica.ParameterCount(total, total, total)


def test_an_empty_model() -> None:
    assert (
        str(lorica.trainable_parameters(nn.Sequential()))
        == "trainable params: 0 || all params: 0 || trainable%: 0.0000"
    )


def test_tied_weights_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert lorica.trainable_parameters(model).total == 20
    assert count(model, r=2, target_modules=["embed"]) == lorica.ParameterCount(18, 38, 38)


def test_heads_of_several_adapters_replace_one_original() -> None:
    model = Toy()
    base, head = lorica.trainable_parameters(model).total, 3 * 6 + 3
    for name in "ab":
        lorica.adapt(model, lorica.LoraConfig(r=1, target_modules=["embed"], modules_to_save=["head"]), name)
    counted = lorica.trainable_parameters(model)
    assert counted.trainable == 2 * (40 + 6 + head)
    assert counted.total == base + counted.trainable
    assert counted.deployed == counted.total - head
