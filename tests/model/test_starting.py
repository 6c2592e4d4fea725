"""Starts that are taken out of W0: on a model, in a file, beside other adapters, and off again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import Toy, outputs, shake, transformer
from torch import Tensor, nn

import lorica
import lorica.algebra
from lorica import LoraConfig, inits
from lorica.errors import AdapterError, ConfigError, FileError, StateError, TargetError
from lorica.layers import lora_layers
from lorica.model.files import extract_live

TAKEN_OUT = ["pissa", "pissa_niter_4", "olora"]
LINEAR = ["up", "down"]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}},
]


def toy(dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(4)
    return Toy(dim=16, dtype=dtype)


def config(value: bool | str, **settings: Any) -> LoraConfig:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": value}
    return LoraConfig(**fields | settings)


def adapt(value: bool | str, **settings: Any) -> Toy:
    return lorica.adapt(toy(), config(value, **settings), seed=0)


def factors(model: nn.Module, path: str = "blocks.0.up") -> tuple[Tensor, Tensor, float]:
    f = extract_live(model).factors[path]
    return f.A, f.B, f.scale


def assert_same_file(one: Path, other: Path) -> None:
    ours, theirs = (lorica.read(folder) for folder in (one, other))
    assert ours.config == theirs.config
    assert ours.trained_as == theirs.trained_as
    tensors = theirs.named_tensors()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in ours.named_tensors().items())


class TestTheStart:
    @pytest.mark.parametrize("value", [*TAKEN_OUT, "orthogonal"])
    @pytest.mark.parametrize("extra", EXTRAS, ids=str)
    def test_the_model_computes_what_it_did(self, value: str, extra: dict[str, Any]) -> None:
        torch.testing.assert_close(outputs(adapt(value, **extra)), outputs(toy()), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("value", TAKEN_OUT)
    def test_what_stands_in_the_module_is_the_rest(self, value: str) -> None:
        model = adapt(value)
        A, B, scale = factors(model)
        W0 = toy().get_parameter("blocks.0.up.weight")
        rest = model.get_parameter("blocks.0.up.weight")
        torch.testing.assert_close(rest, W0 - scale * B @ A)
        assert not rest.requires_grad
        assert float(A.norm()) > 0.1
        assert float(B.norm()) > 0.1

    def test_pissa_is_the_principal_part_of_the_weight(self) -> None:
        A, B, scale = factors(adapt("pissa"))
        U, S, Vh = torch.linalg.svd(toy().get_parameter("blocks.0.up.weight").double())
        expected = (U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]).float()
        torch.testing.assert_close(scale * B @ A, expected, rtol=0, atol=1e-5)

    def test_a_transposed_weight_is_decomposed_as_it_multiplies(self) -> None:
        model = transformer("gpt2")
        before = outputs(model, "gpt2")
        lorica.adapt(model, LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights="olora"))
        layer = lora_layers(model)["transformer.h.0.attn.c_attn"]
        _, B = layer.factor_parameters("default")
        torch.testing.assert_close(B.T @ B, torch.eye(3), rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs(model, "gpt2"), before, rtol=0, atol=1e-5)

    def test_in_bfloat16_the_base_is_rounded_once(self) -> None:
        model = lorica.adapt(toy(torch.bfloat16), config("pissa"))
        A, B, scale = factors(model)
        W0 = toy(torch.bfloat16).get_parameter("blocks.0.up.weight")
        expected = (W0.double() - scale * B.double() @ A.double()).to(torch.bfloat16)
        assert A.dtype == torch.float32
        rest = model.get_parameter("blocks.0.up.weight")
        assert float((rest != expected).float().mean()) < 0.02

    @pytest.mark.parametrize("value", ["pissa_niter_4", "orthogonal"])
    def test_draws_depend_on_seed_and_path_alone(self, value: str) -> None:
        alone = lorica.adapt(toy(), config(value, target_modules=["1.up"]), seed=3)
        among = lorica.adapt(toy(), config(value), seed=3)
        other = lorica.adapt(toy(), config(value), seed=4)
        path = "blocks.1.up"
        assert all(
            torch.equal(a, b) for a, b in zip(factors(alone, path)[:2], factors(among, path)[:2], strict=True)
        )
        assert not torch.equal(factors(other, path)[0], factors(among, path)[0])

    @pytest.mark.parametrize("bits", [4, 8])
    def test_loftq_quantizes_the_base(self, bits: int) -> None:
        model = adapt("loftq", loftq_config={"loftq_bits": bits})
        W0 = toy().get_parameter("blocks.0.up.weight")
        rest = model.get_parameter("blocks.0.up.weight")
        assert torch.equal(rest, inits.quantized(W0.detach(), bits))
        A, B, scale = factors(model)
        assert float((rest + scale * B @ A - W0).detach().norm()) < 0.8 * float((rest - W0).detach().norm())


class TestOffAgain:
    @pytest.mark.parametrize("value", [*TAKEN_OUT, "loftq"])
    def test_the_base_comes_back_bit_for_bit(self, value: str) -> None:
        model, before = toy(), toy().state_dict()
        weight = model.get_parameter("blocks.0.up.weight")
        expected = outputs(model)
        lorica.adapt(model, config(value))
        shake(model)
        with lorica.disabled(model):
            assert torch.equal(outputs(model), expected)
            assert model.get_parameter("blocks.0.up.weight") is weight
        lorica.merge(model)
        lorica.restore(model)
        lorica.detach(model)
        assert model.get_parameter("blocks.0.up.weight") is weight
        assert weight.requires_grad
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert before.keys() == model.state_dict().keys()

    def test_it_follows_a_model_that_was_cast(self) -> None:
        model = adapt("pissa").to(torch.float64)
        lorica.detach(model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert torch.equal(model.get_parameter("head.weight"), toy().double().get_parameter("head.weight"))
        assert torch.equal(model.get_parameter("blocks.0.up.weight"), toy().double().blocks[0].up.weight)  # type: ignore[union-attr]

    def test_an_error_leaves_the_model_alone(self) -> None:
        model, before = toy(), toy().state_dict()
        with pytest.raises(TargetError):
            lorica.adapt(model, config("pissa", rank_pattern={"1.down": 17}))
        assert not lorica.adapters(model)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class TestMerging:
    @pytest.mark.parametrize("value", [*TAKEN_OUT, "loftq"])
    @pytest.mark.parametrize("extra", EXTRAS[:2], ids=str)
    def test_merged_computes_the_same(self, value: str, extra: dict[str, Any]) -> None:
        model = adapt(value, **extra)
        shake(model)
        expected = outputs(model)
        lorica.merge(model)
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-6)
        lorica.restore(model)
        assert torch.equal(outputs(model), expected)

    def test_switching_between_adapters_that_did_and_did_not_change_the_base(self) -> None:
        model = toy()
        for name, value in {"first": "pissa", "plain": True, "second": "olora"}.items():
            lorica.adapt(model, config(value), name)
            shake(model)
        expected = {}
        for name in ("first", "plain", "second"):
            with lorica.active(model, name):
                expected[name] = outputs(model)
        for name in ("plain", "first", "second", "first", "plain"):
            lorica.switch(model, name)
            torch.testing.assert_close(outputs(model), expected[name], rtol=1e-5, atol=1e-6)
        lorica.restore(model)
        assert torch.equal(outputs(model), expected["second"])
        lorica.detach(model)
        assert torch.equal(outputs(model), outputs(toy()))

    def test_a_tied_head_is_untied_when_merged(self) -> None:
        model = transformer("gpt2")
        before = outputs(model, "gpt2")
        lorica.adapt(model, LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights="pissa"))
        torch.testing.assert_close(outputs(model, "gpt2"), before, rtol=0, atol=1e-5)
        shake(model)
        expected = outputs(model, "gpt2")
        assert lorica.merge(model).untied
        torch.testing.assert_close(outputs(model, "gpt2"), expected, rtol=1e-5, atol=1e-5)
        lorica.restore(model)
        lorica.detach(model)
        assert model.lm_head.weight is model.transformer.wte.weight


class TestSeveral:
    def test_each_acts_on_its_own_base(self) -> None:
        model = adapt("pissa")
        shake(model)
        first = outputs(model)
        model.requires_grad_(False)
        lorica.adapt(model, config(True), "plain", seed=1)
        torch.testing.assert_close(outputs(model), outputs(toy()), rtol=1e-6, atol=1e-6)
        shake(model)
        alone = lorica.adapt(toy(), config(True), "plain", seed=1)
        shake(alone)
        with lorica.active(model, "default"):
            assert torch.equal(outputs(model), first)

    def test_a_later_start_is_taken_out_of_the_base_itself(self) -> None:
        model = adapt("pissa")
        lorica.adapt(model, config("pissa"), "second", seed=0)
        first, second = (extract_live(model, name).factors["blocks.0.up"] for name in ("default", "second"))
        assert torch.equal(first.A, second.A)
        assert torch.equal(first.B, second.B)

    def test_with_a_plain_one_the_updates_add_up(self) -> None:
        model = adapt("pissa")
        shake(model)
        lorica.adapt(model, config(True), "plain", seed=1)
        shake(model)
        both = lorica.attach(toy(), lorica.extract(model, "default"), "default")
        lorica.attach(both, lorica.extract(model, "plain"), "plain")
        lorica.active(both, ["default", "plain"])
        lorica.active(model, ["default", "plain"])
        torch.testing.assert_close(outputs(model), outputs(both), rtol=1e-5, atol=1e-5)

    def test_two_that_changed_the_same_weight_do_not_act_together(self) -> None:
        model = adapt("pissa")
        lorica.adapt(model, config("olora"), "second")
        with pytest.raises(AdapterError, match="each took its start out of"):
            lorica.active(model, ["default", "second"])
        plain = lorica.attach(toy(), lorica.extract(model, "default"), "first")
        lorica.attach(plain, lorica.extract(model, "second"), "second")
        lorica.active(plain, ["first", "second"])
        torch.testing.assert_close(outputs(plain), outputs(toy()), rtol=1e-5, atol=1e-5)

    def test_rows_of_a_batch_cannot_differ_in_the_base(self) -> None:
        with pytest.raises(AdapterError, match="cannot differ by row"):
            lorica.mixed(adapt("pissa"), ["default", None, "default"])


class TestFiles:
    @pytest.mark.parametrize("value", TAKEN_OUT)
    @pytest.mark.parametrize("extra", EXTRAS, ids=str)
    def test_a_saved_adapter_is_an_update_of_the_untouched_base(
        self, value: str, extra: dict[str, Any], tmp_path: Path
    ) -> None:
        model = adapt(value, **extra)
        shake(model)
        lorica.save(model, tmp_path)
        loaded = lorica.load(toy(), tmp_path)
        torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-6)
        saved = lorica.extract(loaded).lora
        assert saved.init_lora_weights is True
        assert saved.r == 8
        assert torch.equal(
            loaded.get_parameter("blocks.0.up.weight"), toy().get_parameter("blocks.0.up.weight")
        )

    @pytest.mark.parametrize("value", TAKEN_OUT)
    def test_loaded_to_train_it_is_what_it_was(self, value: str, tmp_path: Path) -> None:
        model = adapt(value)
        shake(model)
        lorica.save(model, tmp_path)
        loaded = lorica.load(toy(), tmp_path, trainable=True)
        assert lorica.adapters(loaded)["default"] == lorica.adapters(model)["default"]
        ours, theirs = loaded.state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        lorica.save(loaded, tmp_path / "again")
        assert_same_file(tmp_path / "again", tmp_path)

    @pytest.mark.parametrize("value", TAKEN_OUT)
    def test_training_goes_on_to_the_bit_though_the_start_came_out_otherwise(
        self, value: str, tmp_path: Path
    ) -> None:
        model = adapt(value)
        shake(model)
        lorica.save(model, tmp_path)
        # As on another machine: the same configuration, and a start that differs in its last digits.
        resumed = lorica.adapt(toy(), config(value), seed=99)
        state: Any = resumed.lorica_state
        for start in [piece.start for piece in state.placing("default")]:
            start.weight.data += 1e-4
            start.A += 1e-4
        lorica.load_weights(resumed, tmp_path)
        ours, theirs = resumed.state_dict(), model.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        lorica.save(resumed, tmp_path / "again")
        assert_same_file(tmp_path / "again", tmp_path)

    @pytest.mark.parametrize("value", ["pissa", "olora", "loftq"])
    @pytest.mark.parametrize("trainable", [True, False])
    def test_as_trained_the_start_is_made_again(self, value: str, trainable: bool, tmp_path: Path) -> None:
        model = adapt(value)
        shake(model)
        lorica.save(model, tmp_path, as_trained=True)
        loaded = lorica.load(toy(), tmp_path, trainable=trainable)
        assert torch.equal(outputs(loaded), outputs(model))
        assert lorica.read(tmp_path).lora.init_lora_weights == value
        other = adapt(value)
        lorica.load_weights(other, tmp_path)
        assert torch.equal(outputs(other), outputs(model))

    def test_as_trained_a_drawn_start_is_refused(self, tmp_path: Path) -> None:
        lorica.save(adapt("pissa_niter_4"), tmp_path, as_trained=True)
        model = toy()
        with pytest.raises(AdapterError, match="that was drawn"):
            lorica.load(model, tmp_path)
        assert not lorica.adapters(model)

    def test_loftq_is_no_update_of_the_base(self, tmp_path: Path) -> None:
        lorica.save(adapt("loftq"), tmp_path)
        adapter = lorica.read(tmp_path)
        assert adapter.lora.init_lora_weights == "loftq"
        with pytest.raises(AdapterError, match="stand beside another weight than W0"):
            adapter.check_on_base("merge it")

    def test_training_goes_on_from_a_file_that_lost_its_header(self, tmp_path: Path) -> None:
        model = adapt("pissa")
        shake(model)
        lorica.save(model, tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"format": "pt"})
        resumed = adapt("pissa")
        lorica.load_weights(resumed, tmp_path)
        assert torch.equal(outputs(resumed), outputs(model))

    def test_algebra_works_on_the_update_and_refuses_what_is_none(self, tmp_path: Path) -> None:
        model = adapt("olora")
        shake(model)
        doubled = lorica.attach(toy(), lorica.algebra.add(*[lorica.extract(model)] * 2))
        once = lorica.attach(toy(), lorica.extract(model))
        path = "blocks.0.up"
        one, two = (lorica.extract(m).factors[path] for m in (once, doubled))
        torch.testing.assert_close(two.scale * two.B @ two.A, 2 * one.scale * one.B @ one.A)
        with pytest.raises(AdapterError, match="stand beside another weight than W0"):
            lorica.algebra.add(extract_live(model))
        with pytest.raises(AdapterError, match="stand beside another weight than W0"):
            lorica.algebra.compress(extract_live(model), rank=1)

    def test_another_rank_does_not_resume(self, tmp_path: Path) -> None:
        lorica.save(adapt("pissa"), tmp_path)
        with pytest.raises(AdapterError, match="does not fit"):
            lorica.load_weights(adapt("pissa", r=2), tmp_path)

    def test_a_wrong_header_is_refused(self, tmp_path: Path) -> None:
        lorica.save(adapt("pissa"), tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        for text in ("{", '{"r": 0}', "[]"):
            safetensors.torch.save_file(tensors, path, {"format": "pt", "lorica_trained_as": text})
            with pytest.raises(FileError, match="header"):
                lorica.read(tmp_path)
        text = '{"r": 3, "init_lora_weights": "pissa"}'
        safetensors.torch.save_file(tensors, path, {"format": "pt", "lorica_trained_as": text})
        with pytest.raises(AdapterError, match="should be 6"):
            lorica.load(toy(), tmp_path, trainable=True)


class TestRefused:
    @pytest.mark.parametrize("value", [*TAKEN_OUT, "loftq", "orthogonal", "eva", "corda", "lora_ga"])
    def test_embeddings(self, value: str) -> None:
        with pytest.raises(TargetError, match=r"embed: init_lora_weights=.* is for linear layers"):
            lorica.adapt(toy(), config(value, target_modules=["embed"]))

    @pytest.mark.parametrize("value", ["pissa", "loftq"])
    def test_a_forward_of_its_own(self, value: str) -> None:
        class Doubling(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        model = nn.Sequential(Doubling(8, 8))
        with pytest.raises(TargetError, match="this Doubling packs it or has a forward of its own"):
            lorica.adapt(model, config(value, target_modules=["0"]))

    @pytest.mark.parametrize(
        ("value", "call"), [("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")]
    )
    def test_data_that_was_never_shown(self, value: str, call: str) -> None:
        model = toy()
        with pytest.raises(StateError, match=f"call lorica.peft.{call}"):
            lorica.adapt(model, config(value))
        assert not lorica.adapters(model)

    def test_more_directions_than_there_are(self) -> None:
        with pytest.raises(TargetError, match="needs 17 directions"):
            lorica.adapt(toy(), config("pissa", r=17))

    @pytest.mark.parametrize("value", ["pisa", "pissa_niter_", "pissa_niter_x", "pissa_niter_[number]", 3])
    def test_unknown_values(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="init_lora_weights must be one of"):
            config(value)

    @pytest.mark.parametrize("settings", [{"r": 3}, {"rank_pattern": {"up": 5}}])
    def test_orthogonal_halves(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="halves"):
            config("orthogonal", **settings)

    def test_a_combination_of_methods(self) -> None:
        model = toy()
        with pytest.raises(ConfigError, match="is for LoRA alone, not in a combination"):
            lorica.adapt(model, [config("pissa"), lorica.BitFitConfig()])
        assert not lorica.adapters(model)


def test_a_file_that_remembers_its_start_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = lorica.adapt(Toy(), lorica.LoraConfig(r=2, target_modules=["up"], init_lora_weights="olora"))
    files = {
        (lorica.save(model, tmp_path / str(i)) / "adapter_model.safetensors").read_bytes() for i in range(8)
    }
    assert len(files) == 1
