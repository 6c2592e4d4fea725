"""`layer_replication`: a deeper model out of the same weights, against one that was built deep."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Toy, record, shake, tokens, transformer

import lorica
from lorica.errors import AdapterError, ConfigError, StateError, TargetError

PLAN = [[0, 2], [1, 2], [0, 1]]
ORDER = [0, 1, 1, 0]


def config(plan: Any = PLAN, **more: Any) -> lorica.LoraConfig:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["up"], "layer_replication": plan}
    return lorica.LoraConfig(**fields | more)


def deep(base: Any) -> Any:
    """The model with its blocks copied."""
    twin = copy.deepcopy(base)
    blocks = list(twin.blocks)
    twin.blocks = torch.nn.ModuleList(copy.deepcopy(blocks[i]) for i in ORDER)
    return twin


def test_it_computes_what_a_model_built_deep_computes() -> None:
    base = Toy()
    model: Any = copy.deepcopy(base)
    expected = deep(base)
    lorica.adapt(model, config(), seed=0)
    lorica.adapt(expected, config(None), seed=0)
    for each in (model, expected):
        shake(each)
    assert len(model.blocks) == 4
    assert model.blocks[1]["up"].base_weight is model.blocks[2]["up"].base_weight
    assert model.blocks[1]["up"].lora_A["default"] is not model.blocks[2]["up"].lora_A["default"]
    assert torch.equal(model(tokens()), expected(tokens()))
    trained = [[p for p in each.parameters() if p.requires_grad] for each in (model, expected)]
    gradients = [
        torch.autograd.grad(each(tokens()).square().sum(), own)
        for each, own in zip((model, expected), trained, strict=True)
    ]
    assert len(gradients[0]) == 8
    torch.testing.assert_close(*gradients)


def test_detached_the_model_has_its_own_list_again() -> None:
    model: Any = Toy()
    before, blocks = record(model), model.blocks
    lorica.adapt(model, config(), "one")
    lorica.adapt(model, config(), "two")
    lorica.detach(model, "one")
    assert len(model.blocks) == 4
    model.eval()
    lorica.detach(model)
    assert model.blocks is blocks
    assert not any(module.training for module in model.modules())
    assert record(model.train()) == before


def test_files_there_and_back(tmp_path: Path) -> None:
    base = Toy()
    model: Any = lorica.adapt(copy.deepcopy(base), config())
    shake(model)
    lorica.save(model, tmp_path)
    assert lorica.read(tmp_path).lora.layer_replication == PLAN
    again = lorica.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))
    lorica.load_weights(again, tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(again))(tokens()), model(tokens()))


def test_merged_switched_and_restored() -> None:
    model: Any = Toy().eval()
    for i, name in enumerate(["one", "two"]):
        lorica.adapt(model, config(), name)
        shake(model, i)
    was = record(model)
    with torch.no_grad():
        answers = {}
        for name in ("one", "two"):
            with lorica.active(model, name):
                answers[name] = model(tokens())
        lorica.merge(model, "one")
        torch.testing.assert_close(model(tokens()), answers["one"])
        lorica.switch(model, "two")
        torch.testing.assert_close(model(tokens()), answers["two"])
        lorica.restore(model)
    assert record(model) == was


def test_a_language_model_is_as_deep_as_it_says_merged_and_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformer("llama")
    before = record(model)
    ids = torch.tensor([[3, 5, 3, 8]])
    lorica.adapt(model, config([[0, 2], [0, 2]], target_modules=["q_proj"]))
    shake(model)
    assert model.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    with torch.no_grad():
        y = model(ids).logits
        lorica.merge(model)
        torch.testing.assert_close(model(ids).logits, y)
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).logits, y)
        lorica.restore(model)
        assert torch.equal(model(ids).logits, y)
    lorica.detach(model)
    assert model.config.num_hidden_layers == 2
    assert record(model) == before


def test_a_block_of_the_new_count() -> None:
    model: Any = lorica.adapt(Toy(), config(layers_to_transform=[3]))
    assert list(lorica.extract(model).factors) == ["blocks.3.up"]


class TestRefused:
    @pytest.mark.parametrize("plan", [[[2, 2]], [[1, 0]], [[-1, 1]], [[0]], [0, 2], "01", [[0, 1.5]], 3])
    def test_what_are_no_ranges(self, plan: Any) -> None:
        with pytest.raises(ConfigError, match="layer_replication must be None or a list of ranges"):
            config(plan)

    @pytest.mark.parametrize(
        ("more", "problem"),
        [
            ({"plan": [[0, 3]]}, r"layer_replication names blocks \[0, 3\], .* and blocks has 2"),
            ({"target_modules": ["upp"]}, "did you mean 'up'"),
        ],
    )
    def test_and_the_model_is_untouched(self, more: dict[str, Any], problem: str) -> None:
        model = Toy()
        before = record(model)
        with pytest.raises(TargetError, match=problem):
            lorica.adapt(model, config(**more))
        assert record(model) == before

    def test_a_model_without_one_list(self) -> None:
        with pytest.raises(TargetError, match="one list of blocks; Linear has none"):
            lorica.adapt(torch.nn.Linear(2, 2), config())
        with pytest.raises(TargetError, match=r"has encoder.block, decoder.block"):
            lorica.adapt(transformer("t5"), config(target_modules=["q"]))

    def test_adapters_for_other_blocks(self) -> None:
        model = lorica.adapt(Toy(), config())
        with pytest.raises(StateError, match=r"layer_replication=None, and those on the model \[\[0, 2\]"):
            lorica.adapt(model, config(None), "two")
        plain = lorica.adapt(Toy(), config(None))
        with pytest.raises(StateError, match="their blocks are not the same"):
            lorica.attach(plain, lorica.extract(model), "two")

    def test_a_file_for_a_shallower_model(self, tmp_path: Path) -> None:
        lorica.save(lorica.adapt(Toy(), config()), tmp_path)
        model = Toy(blocks=1)
        before = record(model)
        with pytest.raises((AdapterError, TargetError), match="layer_replication names blocks"):
            lorica.load(model, tmp_path)
        assert record(model) == before
