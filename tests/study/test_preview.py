"""A dry run says what adapting then does, to the parameter, and leaves the model as it is."""

from __future__ import annotations

import re
from typing import Any

import packing
import pytest
import torch
from tiny import Toy, record, transformer
from torch import nn

import lorica
from lorica import LoftQConfig, LoraConfig
from lorica.errors import ConfigError, LoricaError, StateError, TargetError
from lorica.layers import lora_layers, saved_modules

LINEAR = "all-linear"
CASES: list[tuple[str, Any]] = [
    ("bert-classifier", None),
    ("bert-classifier", LoraConfig(task_type="SEQ_CLS", rank_pattern={"1.attention.self.query": 3})),
    ("bert", LoraConfig(target_modules=LINEAR, use_dora=True)),
    ("bert", LoraConfig(target_modules=["query", "dense"], lora_bias=True)),
    ("gpt2", LoraConfig(target_modules=LINEAR, init_lora_weights="pissa", bias="all")),
    ("bert", LoraConfig(target_modules=["query", "dense"], lora_bias=True)),
    ("gpt2", LoraConfig(target_modules=LINEAR, init_lora_weights="loftq", loftq_config=LoftQConfig())),
    ("gpt2", LoraConfig(trainable_token_indices=[1, 2])),
    ("llama", LoraConfig(target_modules=["lm_head", "q_proj"], modules_to_save=["norm"])),
    ("llama", LoraConfig(layer_replication=[[0, 2], [1, 2]])),
    ("mixtral", LoraConfig(target_modules=LINEAR, r=2)),
    ("t5", LoraConfig(target_modules=["lm_head", "q"], ensure_weight_tying=True)),
    ("roberta", lorica.BitFitConfig(task_type="SEQ_CLS")),
    ("bert", lorica.FullConfig()),
    ("bert", lorica.AdapterHConfig(bottleneck=3)),
    ("gpt2", [LoraConfig(), lorica.PreEmbedConfig(prefix=2)]),
]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_what_adapting_then_does(name: str, config: Any) -> None:
    model = transformer(name)
    before = record(model)
    found = lorica.preview(model, config)
    assert record(model) == before
    lorica.adapt(model, config)
    count = lorica.trainable_parameters(model)
    assert (found.trainable, found.total) == (count.trainable, count.total)
    layers = lora_layers(model)
    assert {path for path in found.adapted if path in layers} | {
        path.rpartition(".")[0] for path in found.adapted if path not in layers
    } == set(layers)
    assert found.whole == [path for path in saved_modules(model) if path]
    by_name = {row.path: row.parameters for row in found.rows}
    for path in found.whole:
        copies: Any = saved_modules(model)[path].modules_to_save["default"]
        assert by_name[path] == sum(p.numel() for p in copies.parameters())
    for path, r in found.adapted.items():
        if path in layers:
            A, B = layers[path].factor_parameters("default")
            more = (layers[path].magnitude_parameter("default"), layers[path].bias_parameter("default"))
            assert A.shape[0] == r
            assert by_name[path] == sum(t.numel() for t in (A, B, *more) if t is not None)
    if name != "t5":  # whose tied tables are one
        assert sum(by_name.values()) == found.trainable


def test_the_ranks_of_experts_are_an_experts() -> None:
    found = lorica.preview(transformer("mixtral"), LoraConfig(target_modules=LINEAR, r=2))
    assert found.adapted["model.layers.0.mlp.experts.gate_up_proj"] == 4  # two in one
    (row,) = [row for row in found.rows if row.path == "model.layers.1.mlp.experts.down_proj"]
    assert (row.kind, row.shape, row.parameters) == ("lora", (4, 16, 24), 4 * 2 * (16 + 24))


def test_a_start_that_needs_data_needs_none_here() -> None:
    model = transformer("gpt2")
    for start in ("eva", "corda", "lora_ga"):
        found = lorica.preview(model, LoraConfig(init_lora_weights=start))
        assert found.trainable == lorica.preview(model, LoraConfig()).trainable
        assert ("eva shares the ranks out" in str(found)) is (start == "eva")


def test_without_the_model() -> None:
    model = transformer("gpt2")
    config = LoraConfig(task_type="CAUSAL_LM")
    found = lorica.preview(model, config)
    assert lorica.preview(model.config, config) == found
    with torch.device("meta"):
        weightless = transformer("gpt2")
    assert lorica.preview(weightless, config) == found


def test_beside_adapters_that_are_there() -> None:
    model = lorica.adapt(Toy(), LoraConfig(r=2, target_modules=["up"]), "preview")
    before = record(model)
    found = lorica.preview(model, LoraConfig(r=3, target_modules=["up", "down"]))
    assert record(model) == before
    assert found.trainable == 2 * 2 * 3 * (6 + 12)
    assert list(lorica.adapters(model)) == ["preview"]


def test_packed_weights_stay_where_they_are() -> None:
    model = nn.Sequential(packing.quantized(nn.Linear(64, 64), "nf4"), nn.Linear(64, 2))
    before = packing.state(model)
    found = lorica.preview(model, LoraConfig(r=2, target_modules=["0", "1"]))
    assert packing.state(model) == before
    assert found.adapted == {"0": 2, "1": 2}
    assert type(model[0]).__name__ == "Linear4bit"


def test_the_table() -> None:
    text = str(lorica.preview(transformer("bert-classifier"), LoraConfig(task_type="SEQ_CLS")))
    assert re.search(r"bert\.encoder\.layer\.\*\.attention\.self\.query +2 +lora +16 x 16 +8 +512\n", text)
    assert re.search(r"classifier +1 +whole +2 x 16 +34\n", text)
    assert text.endswith("4 modules adapted, 1 trained whole; 1,058 of 6,308 parameters train (16.77 %)")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (LoraConfig(target_modules=["uq"]), TargetError),
        (LoraConfig(target_modules=["norm"]), TargetError),
        (LoraConfig(target_modules=["embed"], init_lora_weights="pissa"), TargetError),
        ([LoraConfig(target_modules=["up"], init_lora_weights="eva"), lorica.BitFitConfig()], ConfigError),
    ],
)
def test_what_adapting_refuses_is_refused_in_the_same_words(config: Any, error: type[LoricaError]) -> None:
    with pytest.raises(error) as adapting:
        lorica.adapt(Toy(), config)
    model = Toy()
    before = record(model)
    with pytest.raises(error) as previewing:
        lorica.preview(model, config)
    assert str(previewing.value) == str(adapting.value)
    assert record(model) == before


def test_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match="no model configuration can be had from 'nowhere'"):
        lorica.preview("nowhere")
    merged = lorica.adapt(Toy(), LoraConfig(target_modules=["up"]))
    lorica.merge(merged)
    with pytest.raises(StateError, match="is merged into the weights"):
        lorica.preview(merged, LoraConfig(target_modules=["up"]))
