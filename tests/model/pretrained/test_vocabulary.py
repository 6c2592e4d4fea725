"""A vocabulary that is resized: before an adapter, beside it, and while it is merged."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import shake, transformer

import lorica
from lorica import LoraConfig
from lorica.errors import AdapterError, StateError

IDS = torch.tensor([[4, 41, 43, 5]])


def base(folder: Path, *, tied: bool) -> Any:
    """A base on disk with 40 tokens, as read from there."""
    if not (folder / "config.json").exists():
        transformer("llama", tie_word_embeddings=tied).save_pretrained(folder)
    return type(transformer("llama")).from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["save", "save_pretrained"])
def test_new_rows_are_saved_and_act_on_a_base_of_that_size_alone(
    tmp_path: Path, *, tied: bool, when: str, how: str
) -> None:
    model = base(tmp_path / "base", tied=tied)
    if when == "before":
        model.resize_token_embeddings(44, mean_resizing=False)
    lorica.adapt(model, LoraConfig(r=2, target_modules=["q_proj"]))
    if when == "after":
        model.resize_token_embeddings(44, mean_resizing=False)
    shake(model)
    want = logits(model)
    if how == "save":
        lorica.save(model, tmp_path / "adapter")
    else:
        model.save_pretrained(tmp_path / "adapter")
    names = [key for key in load_file(tmp_path / "adapter/adapter_model.safetensors") if "lora_" not in key]
    assert names == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    other = base(tmp_path / "base", tied=tied)
    with pytest.raises(AdapterError, match=r"lm_head\.weight: \(44, 16\) in the adapter, \(40, 16\)"):
        lorica.load(other, tmp_path / "adapter")
    other.resize_token_embeddings(44, mean_resizing=False)
    lorica.load(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(other), want)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    lorica.load_weights(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), want)
    lorica.detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_vocabulary_of_its_own_size_brings_no_tables(tmp_path: Path) -> None:
    model = base(tmp_path / "base", tied=True)
    lorica.save(lorica.adapt(model, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter")
    assert all("lora_" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))


CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("embed_tokens", {"target_modules": ["embed_tokens"]}),
    "head": ("lm_head", {"target_modules": ["lm_head"]}),
    "tied": ("embed_tokens", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "rows": ("embed_tokens", {"trainable_token_indices": [3]}),
    "whole head": ("lm_head", {"modules_to_save": ["lm_head"]}),
    "whole embedding": ("embed_tokens", {"modules_to_save": ["embed_tokens"]}),
    "start": ("lm_head", {"target_modules": ["lm_head"], "init_lora_weights": "pissa"}),
}


@pytest.mark.parametrize("form", CHANGED)
@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_an_adapter_changes_is_not_resized(form: str, *, tied: bool) -> None:
    named, given = CHANGED[form]
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], **given}
    if form == "tied" and not tied:
        pytest.skip("two tables, one update: not what is asked for")
    model = transformer("llama", tie_word_embeddings=tied)
    lorica.adapt(model, LoraConfig(**fields))
    shake(model)
    want = logits(model, IDS[:, :1])
    with pytest.raises(StateError, match=rf"{named}.*cannot be resized while an adapter changes it"):
        model.resize_token_embeddings(44)
    assert model.get_input_embeddings() is model.resize_token_embeddings()
    assert torch.equal(logits(model, IDS[:, :1]), want)
    assert model.config.vocab_size == 40


@pytest.mark.parametrize("form", ["embedding", "rows", "whole embedding"])
def test_nor_through_a_model_inside(form: str) -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], **CHANGED[form][1]}
    model = lorica.adapt(transformer("llama"), LoraConfig(**fields))
    shake(model)
    want = logits(model, IDS[:, :1])
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(StateError, match=r"model\.embed_tokens.*cannot be resized while an adapter"):
            one.model.resize_token_embeddings(44)
        assert one.model.get_input_embeddings() is one.model.resize_token_embeddings()
        assert torch.equal(logits(one, IDS[:, :1]), want)
    lorica.detach(model)
    model.model.resize_token_embeddings(44)
    assert model.model.embed_tokens.weight.shape[0] == 44
    assert "resize_token_embeddings" not in vars(model.model)


def test_a_model_inside_is_resized_where_no_adapter_changes_its_table() -> None:
    model = lorica.adapt(transformer("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    shake(model)
    want = logits(model, IDS[:, :1])
    model.model.resize_token_embeddings(44, mean_resizing=False)
    assert torch.equal(logits(model, IDS[:, :1]), want)
    assert not model.model.embed_tokens.weight.requires_grad
    lorica.detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nor_one_inside_a_module_that_is_trained_whole() -> None:
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["embeddings"])
    model = lorica.adapt(transformer("bert-classifier"), config)
    for acting in (("default",), ()):
        lorica.active(model, acting)
        for one in (model, model.bert):
            with pytest.raises(StateError, match=r"bert\.embeddings.*word_embeddings cannot be resized"):
                one.resize_token_embeddings(44)


@pytest.mark.parametrize("form", ["embedding", "head", "rows", "whole head"])
def test_resized_while_merged_it_is_not_restored(form: str) -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], **CHANGED[form][1]}
    model = transformer("llama")
    lorica.adapt(model, LoraConfig(**fields))
    shake(model)
    lorica.merge(model)
    model.resize_token_embeddings(44, mean_resizing=False)
    want = logits(model)
    for undo in (lambda: lorica.restore(model), lambda: lorica.switch(model, "default")):
        with pytest.raises(StateError, match=r"weight was replaced since the merge \(resize_"):
            undo()
        assert torch.equal(logits(model), want)


def test_resized_while_other_weights_are_merged_it_is_restored() -> None:
    model = lorica.adapt(transformer("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    shake(model)
    lorica.merge(model)
    model.resize_token_embeddings(44, mean_resizing=False)
    want = logits(model)
    torch.testing.assert_close(logits(lorica.restore(model)), want)
