"""What was measured to be wrong in PEFT 0.21.2 is right here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Toy, batch, bits, shake, tokens, transformer
from torch import Tensor, nn

from lorica.errors import AdapterError, LoricaWarning, StateError, TargetError
from lorica.peft import LoraConfig, PeftModel, get_peft_model


class Attends(nn.Module):
    """One attention over its input."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def attends(dtype: torch.dtype = torch.float32) -> PeftModel:
    model = get_peft_model(Attends(dtype), LoraConfig(r=2, target_modules=["attention"]))
    shake(model)
    return model


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters() if "lora_" not in name}


def requires_grad(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def adapters(model: PeftModel, *names: str) -> PeftModel:
    """The model with more adapters, each shaken."""
    for seed, name in enumerate(names):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["up"]))
        model.set_adapter(name)
        shake(model, seed + 1)
    model.set_adapter("default")
    return model


def toy(**settings: Any) -> PeftModel:
    model = get_peft_model(Toy(), LoraConfig(**{"r": 2, "target_modules": ["up"]} | settings))
    shake(model)
    return model.eval()


@pytest.mark.parametrize("training", [True, False])
def test_the_update_of_an_attentions_output_is_applied_once(training: bool) -> None:
    model = attends().train(training)
    x = torch.randn(2, 5, 8)
    reference = Attends()
    reference.load_state_dict(
        {k: v for k, v in model.get_base_model().state_dict().items() if "lora_" not in k}
    )
    layers = {"": reference.attention.in_proj_weight, ".out_proj": reference.attention.out_proj.weight}
    for path, weight in layers.items():
        layer: Any = model.get_submodule(f"base_model.model.attention{path}")
        delta = layer.lora_B.default.weight @ layer.lora_A.default.weight * layer.scaling["default"]
        assert delta.abs().max() > 0.01
        with torch.no_grad():
            weight += delta
    torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_never_writes_to_the_base(dtype: torch.dtype) -> None:
    model = attends(dtype)
    before = weights(model)
    for training in (True, False):
        model.train(training)(torch.randn(2, 5, 8, dtype=dtype))
    assert weights(model) == before


def test_a_hundred_merges_in_bfloat16_leave_every_bit() -> None:
    model = get_peft_model(
        transformer("llama", dtype=torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"])
    )
    shake(model)
    before = weights(model)
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    assert weights(model) == before


@pytest.mark.parametrize("before", ["merged", "disabled", "acting"])
def test_a_merge_that_fails_leaves_the_model_as_it_was(before: str) -> None:
    model = adapters(toy(), "other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.fill_(float("nan"))
    if before == "merged":
        model.merge_adapter(["default"])
    elif before == "disabled":
        model.base_model.disable_adapter_layers()
    expected = model(tokens()), model.get_model_status(), model.base_model._resting
    with pytest.raises(AdapterError, match="NaN"):
        model.merge_adapter(["other"])
    found = model(tokens()), model.get_model_status(), model.base_model._resting
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


def test_two_that_cannot_act_together_are_refused_while_disabled_too() -> None:
    model = toy(modules_to_save=["head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    model.base_model.disable_adapter_layers()
    with pytest.raises(AdapterError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "other"])
    assert not model.has_active_enabled_adapter
    model.base_model.enable_adapter_layers()
    assert model.active_adapters == ["default"]


def test_a_misspelt_target_beside_a_right_one_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'upp'.*did you mean 'up'"):
        get_peft_model(Toy(), LoraConfig(target_modules=["up", "upp"]))


@pytest.mark.parametrize("inference", [True, False])
def test_disabling_leaves_alone_what_trains(inference: bool) -> None:
    model = toy(inference_mode=inference)
    before = requires_grad(model)
    with model.disable_adapter():
        assert requires_grad(model) == before
        model(tokens())
    assert requires_grad(model) == before
    assert any(before.values()) is not inference


def test_loading_and_adding_leave_alone_what_trains(tmp_path: Any) -> None:
    model = toy()
    model.save_pretrained(tmp_path)
    frozen = toy(inference_mode=True)
    for each in (model, frozen):
        before = requires_grad(each)
        each.load_adapter(tmp_path, "second")
        each.add_adapter("third", LoraConfig(r=2, target_modules=["down"]))
        each.load_adapter(tmp_path, "default")
        after = requires_grad(each)
        assert {name: after[name] for name in before} == before
        assert not any(trains for name, trains in after.items() if name not in before)


def test_values_of_another_scale_are_taken_as_peft_does_and_said(tmp_path: Any) -> None:
    model = toy()
    model.save_pretrained(tmp_path)
    other = toy(lora_alpha=64)
    with pytest.warns(LoricaWarning, match=r"scale of blocks\.0\.up"):
        other.load_adapter(tmp_path, "default")
    torch.testing.assert_close(update(other, "default"), 8 * update(model, "default"))


def update(model: PeftModel, name: str) -> Tensor:
    """What an adapter adds to the first layer's weight."""
    layer: Any = model.get_submodule("base_model.model.blocks.0.up")
    return layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]


@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
def test_combining_with_rslora_keeps_the_scale(combination: str) -> None:
    model = get_peft_model(Toy(), LoraConfig(r=4, use_rslora=True, target_modules=["up"]))
    shake(model)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["up"]))
    model.add_weighted_adapter(["default"], [0.5], "halved", combination_type=combination)
    torch.testing.assert_close(update(model, "halved"), 0.5 * update(model, "default"))
    model.set_adapter("other")
    shake(model, 1)
    if combination != "linear":
        model.add_weighted_adapter(["default", "other"], [1.0, -2.0], "both", combination, svd_rank=None)
        if combination == "cat":
            torch.testing.assert_close(
                update(model, "both"), update(model, "default") - 2 * update(model, "other")
            )


def test_a_combination_of_more_rank_than_the_layer_has_still_runs() -> None:
    model = adapters(toy(), "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "svd", svd_rank=64)
    torch.testing.assert_close(update(model, "sum"), update(model, "default") + update(model, "other"))
    model.set_adapter("sum")
    assert model(tokens()).isfinite().all()


class Experts(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight).sum(1)


@pytest.mark.parametrize("training", [True, False])
def test_the_update_of_stacked_weights_is_the_same_in_every_forward(training: bool) -> None:
    base = nn.ModuleDict({"experts": Experts()})
    model: Any = get_peft_model(
        base, LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    )
    shake(model)
    before = weights(model)
    trained = requires_grad(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"]))
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in trained} == trained
    assert not any(p.requires_grad for name, p in model.named_parameters() if name not in trained)
    experts = model.train(training).get_base_model()["experts"]
    x = torch.randn(2, 5)
    first = experts(x)
    for _ in range(3):
        assert torch.equal(experts(x), first)
    assert weights(model) == before
    with model.disable_adapter():
        assert not torch.allclose(experts(x), first)


def test_trained_rows_freeze_and_thaw_like_any_other_part() -> None:
    model = toy(trainable_token_indices={"embed": [1, 3]})
    name = "base_model.model.embed.token_adapter.trainable_tokens_delta.default"
    rows = dict(model.named_parameters())[name]
    model.set_requires_grad("default", False)
    assert not rows.requires_grad
    model.set_adapter("default")
    assert rows.requires_grad
    (status,) = [layer for layer in model.get_layer_status() if layer.name.startswith("model.embed")]
    assert (status.module_type, status.requires_grad) == ("TrainableTokensLayer", {"default": True})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_update_of_tied_tables_is_trained_and_merged_once(dtype: torch.dtype) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(transformer("gpt2", dtype=dtype), config)
    shake(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    A, B = trained
    assert len({p.data_ptr() for p in model.parameters() if p.requires_grad}) == len(trained)
    base = model.get_base_model()
    update = 4 * (B @ A).t()
    expected = (base.transformer.wte.base_weight.float() + update).to(dtype)  # pyright: ignore
    y = model(**batch("gpt2")).logits
    merged: Any = model.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, expected)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings
    if dtype == torch.float32:
        torch.testing.assert_close(merged(**batch("gpt2")).logits, y)


def test_a_name_that_is_taken_is_refused() -> None:
    model = adapters(toy(), "other")
    with pytest.raises(AdapterError, match="already has an adapter named 'other'"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "other")


def test_a_dilated_convolution_runs_and_merges() -> None:
    base = nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2, padding=2, padding_mode="circular"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    shake(model)
    x = torch.randn(2, 3, 9)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-5, atol=1e-5)


def test_where_no_adapter_is_left_that_is_said(tmp_path: Any) -> None:
    model = toy()
    model.delete_adapter("default")
    with pytest.raises(StateError, match="no adapter acts; the model has: none"):
        _ = model.active_peft_config
    with pytest.raises(StateError, match="no adapter acts"):
        model.create_or_update_model_card(tmp_path)


def test_what_an_adapter_adds_takes_the_bases_dtype_where_it_is_asked_for() -> None:
    config = LoraConfig(r=2, target_modules=["up"], target_parameters=["head.weight"], use_dora=False)
    model = get_peft_model(Toy(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    brought = {name: p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert len(brought) == 6
    assert set(brought.values()) == {torch.bfloat16}
    assert model(tokens()).dtype == torch.bfloat16
