"""A base under its adapters: its own values, another one, one that is adapted again, while it is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dropin.net import Net, fill, x
from torch import Tensor, nn

import lorica.peft as peft
from lorica.errors import AdapterError, LoricaWarning, StateError, TargetError
from lorica.peft import LoraConfig, PeftModel, get_peft_model
from lorica.peft.utils import ModulesToSaveWrapper

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "all"},
    "head": {"modules_to_save": ["head"]},
    "bias on B": {"bias": "lora_only", "lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [False, True])
class TestOfTheBase:
    def test_its_own_tensors_by_its_own_names(self, kind: str, merged: bool) -> None:
        before = {key: tensor.clone() for key, tensor in Net().state_dict().items()}
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], **KINDS[kind]))
        fill(model)
        y = model(x)
        if merged:
            model.merge_adapter()
        state = peft.get_base_model_state_dict(model)
        assert list(state) == list(before)
        for key, tensor in before.items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)
        torch.testing.assert_close(model(x), y)  # looking changes nothing

    def test_counts_do_not_change_by_merging(self, kind: str, merged: bool) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], **KINDS[kind]))
        before = model.get_nb_trainable_parameters(), model.get_model_status().total_params
        if merged:
            model.merge_adapter()
        assert (model.get_nb_trainable_parameters(), model.get_model_status().total_params) == before


class TestAnotherBase:
    def test_it_is_loaded_below_the_adapter(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], bias="all"))
        other = {key: torch.randn_like(tensor) for key, tensor in Net().state_dict().items()}
        result = peft.set_base_model_state_dict(model, other)
        assert result == ([], [])
        with model.disable_adapter():
            plain = Net()
            plain.load_state_dict(other)
            torch.testing.assert_close(model(x), plain(x))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda state: state.pop("head.bias"), r"Missing key\(s\).*head.bias"),
            (lambda state: state.update(more=torch.ones(1)), r"Unexpected key\(s\).*more"),
            (lambda state: state.update({"head.bias": torch.ones(1)}), r"shape of head.bias"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, change: Any, match: str) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        state = {key: tensor + 1 for key, tensor in Net().state_dict().items()}
        change(state)
        with pytest.raises(RuntimeError, match=match):
            peft.set_base_model_state_dict(model, state)
        assert torch.equal(model.get_base_model().body.weight, Net().body.weight)  # type: ignore[union-attr]

    def test_not_below_what_was_taken_out_of_it(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], init_lora_weights="pissa"))
        with pytest.raises(StateError, match="'default' was taken out of the base"):
            peft.set_base_model_state_dict(model, Net().state_dict())


class TestAgain:
    def test_the_one_that_is_there_gives_way(self) -> None:
        base = Net()
        get_peft_model(base, LoraConfig(r=2, target_modules=["body"]))
        with pytest.warns(LoricaWarning, match="for a second time"):
            model = get_peft_model(base, LoraConfig(r=4, target_modules=["head"]))
        assert model.peft_config["default"].r == 4
        assert type(base.body) is nn.Linear
        assert model.active_adapters == ["default"]

    def test_one_that_cannot_be_put_on_leaves_it(self) -> None:
        base = Net()
        first = get_peft_model(base, LoraConfig(r=2, target_modules=["body"]))
        fill(first)
        y = base(x)
        with pytest.warns(LoricaWarning), pytest.raises(TargetError):
            get_peft_model(base, LoraConfig(target_modules=["nothing"]))
        torch.testing.assert_close(base(x), y, rtol=0, atol=0)

    def test_a_saved_one_onto_the_base_it_was_trained_on(self, tmp_path: Path) -> None:
        base = Net()
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["body"]))
        fill(model)
        y = base(x)
        model.save_pretrained(tmp_path)
        with pytest.warns(LoricaWarning):
            again = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(again(x), y, rtol=0, atol=0)

    def test_the_start_is_what_it_would_have_been(self) -> None:
        def start(base: Net) -> Tensor:
            torch.manual_seed(3)
            get_peft_model(base, LoraConfig(r=2, target_modules=["body"]))
            return base.body.lora_A["default"].weight.detach()  # type: ignore[index, union-attr]

        base = Net()
        first = start(base)
        with pytest.warns(LoricaWarning):
            assert torch.equal(start(base), first)


def test_the_configuration_that_is_given_is_the_models_own(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["body"])
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Net(), tmp_path, config=config)
    assert model.peft_config["default"] is config
    assert config.inference_mode


class TestWithoutValues:
    def test_an_adapter_on_the_meta_device_takes_its_values(self) -> None:
        config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
        source = get_peft_model(Net(), config)
        fill(source)
        model = get_peft_model(Net(), config, low_cpu_mem_usage=True)
        assert {p.device.type for n, p in model.named_parameters() if "default" in n} == {"meta"}
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(source), low_cpu_mem_usage=True)
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
        assert model.get_nb_trainable_parameters() == source.get_nb_trainable_parameters()

    def test_it_needs_all_of_them(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]), low_cpu_mem_usage=True)
        with pytest.raises(AdapterError, match=r"(?s)meta device.*body\.lora_A"):
            peft.set_peft_model_state_dict(model, {})


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("how", ["init_lora_weights", "path_initial"])
def test_pefts_recipe_for_a_start_that_changes_the_base(init: str, how: str, tmp_path: Path) -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    fill(model)
    y = model(x)
    start = tmp_path / "start" if how == "path_initial" else None
    model.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=start)
    for trainable in (False, True):
        again = PeftModel.from_pretrained(Net(), tmp_path / "trained", is_trainable=trainable)
        torch.testing.assert_close(again(x), y)


class TestWhileMerged:
    def test_it_can_be_looked_into(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
        fill(model)
        y, keys = model(x), list(model.state_dict())
        model.merge_adapter()
        base: Any = model.get_base_model()
        assert isinstance(base.body, peft.tuners.lora.LoraLayer)
        assert isinstance(base.head, ModulesToSaveWrapper)
        assert base.body.merged_adapters == ["default"]
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(x), y)
        with pytest.warns(LoricaWarning, match="All adapters are already merged"):
            model.merge_adapter()
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), y)

    def test_deleting(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        model.add_adapter("other", LoraConfig(r=2, target_modules=["body"]))
        fill(model)
        y = model(x)
        model.merge_adapter()
        with pytest.raises(StateError, match="while they are merged"):
            model.delete_adapter("default")
        model.delete_adapter("other")
        torch.testing.assert_close(model(x), y)
        assert model.base_model.merged_adapters == ["default"]
        with pytest.raises(AdapterError, match="Adapter other does not exist"):
            model.delete_adapter("other")


class TestValuesOfTheBase:
    """An adapter's values that hold biases which the adapter on the model does not train."""

    def test_they_act_while_it_does(self) -> None:
        source = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"], bias="all"))
        fill(source)
        state = peft.get_peft_model_state_dict(source)
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        assert peft.set_peft_model_state_dict(model, state).unexpected_keys == []
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), Net()(x), rtol=0, atol=0)

    def test_they_are_saved_with_it(self, tmp_path: Path) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        state = {**peft.get_peft_model_state_dict(model), "base_model.model.head.bias": torch.ones(3)}
        peft.set_peft_model_state_dict(model, state)
        y = model(x)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x), y, rtol=0, atol=0)
        model.merge_adapter()
        torch.testing.assert_close(model(x), y)

    def test_what_is_the_bases_already_is_not_brought(self) -> None:
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["body"]))
        state = {"base_model.model.body.base_layer.bias": Net().body.bias.detach(), "nothing": torch.ones(1)}
        result = peft.set_peft_model_state_dict(model, state)
        assert result.unexpected_keys == ["base_model.model.nothing"]
        assert not model.base_model.adapter_state.stand_ins("default")


def test_pefts_file_of_a_resized_table_with_trained_rows(tmp_path: Path) -> None:
    def net() -> Any:
        torch.manual_seed(1)
        model = Net()
        model.table = nn.Embedding(5, 2)
        return model

    config = LoraConfig(r=2, target_modules=["body"], trainable_token_indices={"table": [1]})
    source = get_peft_model(net(), config)
    state = peft.get_peft_model_state_dict(source)
    table = torch.randn(5, 2)
    whole = {**state, "base_model.model.table.token_adapter.base_layer.weight": table}
    source.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(whole, tmp_path / "adapter_model.bin")
    model: Any = PeftModel.from_pretrained(net(), tmp_path).get_base_model()
    expected = table.clone()
    expected[1] = net().table.weight[1].detach()
    torch.testing.assert_close(model.table(torch.arange(5)), expected, rtol=0, atol=0)
