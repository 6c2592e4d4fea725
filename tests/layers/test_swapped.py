"""The change of class in place: what stays, and what survives a copy, a pickle and a file."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny import Toy, outputs, record, tokens
from torch import Tensor, nn

import lorica
from lorica import LoraConfig
from lorica.check import layer_class
from lorica.errors import AdapterError
from lorica.layers import LoraConv, LoraEmbedding, LoraLayer, LoraLinear, swapped_class
from lorica.layers.swapped import Factor, blank

EVERYTHING = ("embed", "up", "down", "head")


class Mixed(nn.Module):
    """One layer of each kind, those that torch's kernels read included."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.encoder(x).mean(1))


KINDS = ("embed", "conv", "self_attn", "linear1", "linear2")


def mixed() -> Any:
    """Every kind of adapted layer, a head trained whole, two adapters."""
    model, _ = oracle.adapted(Mixed(), *KINDS, name="a", modules_to_save=["head"])
    oracle.adapted(model, *KINDS, name="b", r=2, bias="lora_only")
    return model.eval()


class TestFactor:
    """Made without `nn.Module`'s own start, and a module like any other."""

    def test_it_is_in_the_state_that_torch_would_give_it(self) -> None:
        weight = nn.Parameter(torch.ones(2, 3))
        plain = nn.Module()
        plain.register_parameter("weight", weight)
        plain.register_parameter("bias", None)
        made, by_torch = vars(Factor.of(weight)), vars(plain)
        assert {name: type(value) for name, value in made.items()} == {
            name: type(value) for name, value in by_torch.items()
        }
        assert made == by_torch

    @pytest.mark.parametrize("cls", [Factor, nn.ModuleDict])
    def test_no_two_share_anything(self, cls: type[nn.Module]) -> None:
        one, other = vars(blank(cls)), vars(blank(cls))
        shared = [name for name, value in one.items() if value is other[name]]
        assert shared == [name for name, value in one.items() if value is None or isinstance(value, bool)]

    def test_hooks_of_one_are_not_anothers(self) -> None:
        model, _ = oracle.adapted(Toy(), "up", name="a")
        oracle.adapted(model, "up", name="b")
        layer = model.get_submodule("blocks.0.up")
        called = []
        layer.lora_A["a"].register_state_dict_pre_hook(lambda *_: called.append("a"))
        layer.lora_A.register_state_dict_pre_hook(lambda *_: called.append("all"))
        model.state_dict()
        assert called == ["all", "a"]


class TestInPlace:
    def test_the_module_is_still_what_it_was(self) -> None:
        base = Toy()
        modules = dict(base.named_modules())
        model, _ = oracle.adapted(base, *EVERYTHING)
        assert model is base
        assert all(model.get_submodule(path) is module for path, module in modules.items())
        assert isinstance(model.head, nn.Linear)
        assert isinstance(model.head, LoraLinear)
        assert isinstance(model.embed, nn.Embedding)
        assert isinstance(model.embed, LoraEmbedding)

    def test_base_keys_and_tensors_stay(self) -> None:
        base = Toy()
        before = dict(base.named_parameters())
        model, _ = oracle.adapted(base, *EVERYTHING)
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in before.items())
        assert [key for key in model.state_dict() if "lora_" not in key] == list(before)

    def test_live_names_are_the_ecosystems(self) -> None:
        model, _ = oracle.adapted(Toy(blocks=1), "embed", "up", name="mine")
        assert [key for key in model.state_dict() if "lora_" in key] == [
            "embed.lora_embedding_A.mine",
            "embed.lora_embedding_B.mine",
            "blocks.0.up.lora_A.mine.weight",
            "blocks.0.up.lora_B.mine.weight",
        ]

    def test_a_bases_checkpoint_still_loads(self) -> None:
        state = Toy().state_dict()
        model, _ = oracle.adapted(Toy(), *EVERYTHING)
        result = model.load_state_dict(state, strict=False)
        assert not result.unexpected_keys
        assert all("lora_" in key for key in result.missing_keys)
        assert torch.equal(model.head.weight, state["head.weight"])

    def test_the_class_says_what_it_is(self) -> None:
        model, _ = oracle.adapted(Toy(), "head")
        assert type(model.head).__name__ == "LoraLinear"
        assert type(model.head).__module__ == "torch.nn.modules.linear"
        assert "(head): LoraLinear(" in repr(model)

    def test_what_was_taken_off_follows_the_module(self) -> None:
        model: Any = Toy()
        lorica.adapt(model, LoraConfig(target_modules=["up"], modules_to_save=["head"]))
        for module in (model.blocks[0]["up"], model.head):
            state = module.leave()
            module.eval().to("meta")
            swapped_class(state.mixin, type(module)).enter(module, state)
            assert not any(part.training for part in module.modules())
            assert all(parameter.device.type == "meta" for parameter in module.parameters())

    def test_one_class_for_each_pair(self) -> None:
        model, _ = oracle.adapted(Toy(), "up", "down")
        assert (
            type(model.blocks[0]["up"])
            is type(model.blocks[1]["down"])
            is swapped_class(LoraLinear, nn.Linear)
        )
        assert swapped_class(LoraConv, nn.Conv1d) is not swapped_class(LoraConv, nn.Conv2d)

    def test_an_adapted_layers_kind_is_found_again(self) -> None:
        model = mixed()
        for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
            kind = layer_class(layer)
            assert kind is not None
            assert kind.__module__.startswith("lorica.layers.")
            assert isinstance(layer, kind)

    def test_hooks_and_references_survive(self) -> None:
        base = Toy()
        calls: list[str] = []
        base.head.register_forward_pre_hook(lambda *_: calls.append("before"))
        base.head.register_forward_hook(lambda *_: calls.append("after"))
        elsewhere = [base.head]
        model, _ = oracle.adapted(base, "head")
        expected = model(tokens())
        assert calls == ["before", "after"]
        assert elsewhere[0] is model.head
        assert torch.equal(model(tokens()), expected)

    def test_moving_and_casting_take_the_factors_along(self) -> None:
        model, before = oracle.adapted(Toy(), *EVERYTHING)
        model.double()
        assert all(p.dtype == torch.float64 for p in model.parameters())
        expected = torch.func.functional_call(before.double(), oracle.folded(model, before), tokens())
        torch.testing.assert_close(model(tokens()), expected)
        assert all(p.is_meta for p in model.to("meta").parameters())

    def test_a_layer_used_in_two_places_is_adapted_once(self) -> None:
        base = Toy()
        base.blocks[1]["up"] = base.blocks[0]["up"]  # pyright: ignore[reportIndexIssue]
        model, before = oracle.adapted(base, "up")
        assert list(lorica.extract(model).factors) == ["blocks.0.up"]
        torch.testing.assert_close(model(tokens()), before_with_shared(model, before))


def before_with_shared(model: Any, before: Any) -> Tensor:
    with torch.no_grad():
        before.blocks[0]["up"].weight += oracle.delta(model.blocks[0]["up"], "default")
    return before(tokens())


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_file])
class TestCopies:
    def test_a_copy_computes_the_same(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        model = mixed()
        twin = copied(model)
        for names in (["a"], ["b"], ["a", "b"], []):
            lorica.active(model, names)
            lorica.active(twin, names)
            assert torch.equal(model(tokens()), twin(tokens()))

    def test_it_has_a_state_of_its_own(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        model = mixed()
        expected = model(tokens())
        twin = copied(model)
        lorica.disabled(twin)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        lorica.detach(twin, "a")
        assert torch.equal(model(tokens()), expected)
        assert list(lorica.adapters(model)) == ["a", "b"]

    def test_its_adapters_can_be_taken_off(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        twin = lorica.detach(copied(mixed()))
        assert type(twin.head) is nn.Linear
        assert not any(isinstance(module, LoraLayer) for module in twin.modules())
        assert all(parameter.requires_grad for parameter in twin.parameters())

    def test_it_can_be_merged_and_restored(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        model = mixed()
        twin = copied(model)
        lorica.merge(twin, "a")
        lorica.active(model, "a")
        torch.testing.assert_close(twin(tokens()), model(tokens()))
        before = record(model)
        lorica.restore(twin)
        assert record(twin).values == before.values


def test_a_transformers_model_survives_a_copy_and_a_pickle() -> None:
    from tiny import transformer

    model, _ = oracle.adapted(transformer("bert-classifier"), "query", "value", task_type="SEQ_CLS")
    for copied in (by_deepcopy, by_pickle, by_file):
        twin = copied(model)
        assert type(twin).__name__ == "BertForSequenceClassification"
        assert torch.equal(outputs(model), outputs(twin))


_FRESH = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
import lorica
assert list(lorica.adapters(model)) == ["default"]
lorica.detach(model)
assert type(model[0]) is torch.nn.Linear and type(model[1].self_attn) is torch.nn.MultiheadAttention
"""


def test_a_fresh_process_can_load_it(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0), nn.Linear(8, 2))
    model, _ = oracle.adapted(base, "0", "self_attn", "linear1", modules_to_save=["2"])
    x = torch.randn(3, 4)
    model.eval()
    torch.save(model, tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("model.pt", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", _FRESH, *files], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x))


def test_torchs_safe_loading_refuses_the_model_and_takes_its_state() -> None:
    model, _ = oracle.adapted(Toy(), "up")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file, weights_only=True)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin, _ = oracle.adapted(Toy(), "up")
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(tokens()), model(tokens()))


class TestAutocast:
    @pytest.mark.parametrize("targets", [["conv"], ["embed"], ["linear1"], ["self_attn"], [*KINDS, "head"]])
    def test_every_kind_of_layer_runs_and_trains(self, targets: list[str]) -> None:
        model, before = oracle.adapted(Mixed(), *targets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(tokens())
            assert y.dtype == before(tokens()).dtype
        exact = torch.func.functional_call(before, oracle.folded(model, before), tokens())
        assert (y - exact).norm() < 0.05 * exact.norm()
        y.float().sum().backward()
        factors = [p for n, p in model.named_parameters() if "lora_" in n]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in factors)


def test_a_bias_of_one_adapter_and_the_whole_module_of_another_cannot_act_together() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    lorica.adapt(model, LoraConfig(r=1, target_modules=["body"], bias="all"), "biases")
    lorica.adapt(model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]), "whole")
    with pytest.raises(AdapterError, match="each brings its own head"):
        lorica.active(model, ["biases", "whole"])
