"""Merging into packed weights, and into plain layers in their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import KINDS, NEEDED, quantized, state
from tiny import VOCABULARY, adapted, shake, tokens
from torch import Tensor, nn

import lorica
from lorica.errors import AdapterError, ConfigError, StateError, TargetError
from lorica.layers.quantized import dequantize, quantizer_of

CONFIG = lorica.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"])
kinds = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """Two adapted layers and one that is not, all packed, between plain ones."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 64, dtype=dtype)
        self.up, self.down, self.mix = (
            quantized(nn.Linear(*shape, dtype=dtype), kind) for shape in ((64, 128), (128, 64), (64, 64))
        )
        self.head = nn.Linear(64, 3, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.mix(x + self.down(torch.tanh(self.up(x))))
        return self.head(x.mean(1))


def trained(kind: str, *names: str, **options: Any) -> Net:
    """A net with trained adapters, in training mode, so int8 rounds no input; the last acts."""
    model = Net(kind, **options)
    for seed, name in enumerate(names or ("default",)):
        adapted(model, CONFIG, name, seed)
    return model.train()


def sums(model: Net, name: str = "default") -> dict[str, Tensor]:
    """W0 + scale·B·A in float32 of the adapted layers."""
    factors = lorica.extract(model, name).factors
    return {path: dequantize(model.get_submodule(path)) + f.scale * f.B @ f.A for path, f in factors.items()}


@kinds
class TestInto:
    def test_dequantized_is_exact_and_all_plain(self, kind: str) -> None:
        model = trained(kind)
        expected, y, before = sums(model), model(tokens()), state(model)
        report = lorica.merge(model, into="dequantized")
        assert set(report.layers) == {"up", "down"}
        assert report.worst[1] < 1e-6
        for path in ("up", "down", "mix"):
            layer = model.get_submodule(path)
            assert type(layer) is nn.Linear
            assert type(layer.weight) is nn.Parameter
            assert layer.weight.dtype == torch.float32
        for path, exact in expected.items():
            torch.testing.assert_close(model.get_parameter(f"{path}.weight"), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(tokens()), y, rtol=1e-5, atol=1e-5)
        lorica.restore(model)
        assert state(model) == before
        assert torch.equal(model(tokens()), y)

    def test_quantized_packs_the_sum_and_says_what_that_cost(self, kind: str) -> None:
        model = trained(kind)
        expected, y, before = sums(model), model(tokens()), state(model)
        classes = {path: type(module) for path, module in Net(kind).named_children()}
        losses = {}
        W0 = {path: dequantize(model.get_submodule(path)) for path in expected}
        report = lorica.merge(model, into="quantized")
        for path, exact in expected.items():
            layer = model.get_submodule(path)
            assert type(layer) is classes[path]
            assert quantizer_of(layer) is not None
            stored = dequantize(layer)
            losses[path] = float((stored - exact).norm() / (exact - W0[path]).norm())
            assert (stored - exact).norm() < 0.15 * exact.norm()
        assert report.layers == pytest.approx(losses, rel=1e-3)
        assert 1e-3 < report.worst[1] < 1
        assert (model(tokens()) - y).norm() < 0.5 * y.norm()
        lorica.restore(model)
        assert state(model) == before
        assert torch.equal(model(tokens()), y)

    @pytest.mark.parametrize("into", ["quantized", "dequantized"])
    def test_switching_and_restoring(self, kind: str, into: Any) -> None:
        model = trained(kind, "a", "b")
        before, outputs = state(model), {}
        for name in ("a", "b"):
            lorica.merge(model, name, into=into)
            outputs[name] = model(tokens())
            lorica.restore(model)
        lorica.merge(model, "a", into=into)
        for name in ("b", "a", "a"):
            lorica.switch(model, name)
            assert torch.equal(model(tokens()), outputs[name])
        lorica.restore(model)
        assert state(model) == before
        assert not torch.equal(outputs["a"], outputs["b"])

    def test_into_a_lower_precision(self, kind: str) -> None:
        model = trained(kind, dtype=torch.bfloat16)
        expected = sums(model)
        lorica.merge(model, into="dequantized")
        for path, exact in expected.items():
            weight = model.get_parameter(f"{path}.weight")
            assert weight.dtype == torch.bfloat16
            torch.testing.assert_close(weight.float(), exact, rtol=2**-8, atol=1e-6)
        assert model(tokens()).dtype == torch.bfloat16

    def test_dora(self, kind: str) -> None:
        model = Net(kind)
        adapted(model, CONFIG.replace(use_dora=True)).train()
        y = model(tokens())
        assert lorica.merge(model, into="dequantized").worst[1] < 1e-5
        torch.testing.assert_close(model(tokens()), y, rtol=1e-4, atol=1e-5)


class TestRefusals:
    def test_the_choice_must_be_made_and_be_one_of_two(self) -> None:
        model = trained("nf4")
        y = model(tokens())
        with pytest.raises(
            StateError, match=r'up, down are quantized; .*into="quantized".*into="dequantized"'
        ):
            lorica.merge(model)
        with pytest.raises(ConfigError, match="into must be"):
            lorica.merge(model, into="original")  # pyright: ignore[reportArgumentType]
        assert torch.equal(model(tokens()), y)

    def test_nothing_to_choose_where_no_update_goes_into_a_packed_layer(self) -> None:
        model = Net("nf4")
        adapted(model, CONFIG.replace(target_modules=["head"]))
        y = model.train()(tokens())
        lorica.merge(model)
        torch.testing.assert_close(model(tokens()), y)
        assert type(model.up) is not nn.Linear

    @pytest.mark.parametrize("into", ["quantized", "dequantized"])
    def test_an_adapter_that_diverged(self, into: Any) -> None:
        model = trained("nf4", "a", "bad")
        model.get_parameter("up.lora_B.bad.weight").data[0, 0] = torch.inf
        before = state(model)
        with pytest.raises(AdapterError, match="up: the merged weight would hold NaN or infinity"):
            lorica.merge(model, into=into)
        assert state(model) == before
        lorica.merge(model, "a", into=into)
        y = model(tokens())
        with pytest.raises(AdapterError, match="up: the merged weight"):
            lorica.switch(model, "bad")
        assert torch.equal(model(tokens()), y)
        lorica.restore(model)
        assert state(model) == before

    def test_a_forward_replaced_on_the_module(self) -> None:
        model = trained("nf4")
        model.mix.forward = model.mix.forward  # as accelerate does
        with pytest.raises(TargetError, match="mix: its forward was replaced"):
            lorica.merge(model, into="dequantized")


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("kind", TRANSFORMERS)
class TestTransformers:
    """A model that `from_pretrained` quantizes, from loading to both ways of merging."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        pytest.importorskip("bitsandbytes", reason=NEEDED)
        transformers: Any = pytest.importorskip("transformers")
        pytest.importorskip("accelerate", reason="transformers quantizes with it")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def load(self, folder: Path, kind: str) -> Any:
        import transformers

        config = transformers.BitsAndBytesConfig(**TRANSFORMERS[kind])
        return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_trained_by_their_trainer(
        self, folder: Path, tmp_path: Path, kind: str, checkpointing: bool
    ) -> None:
        import transformers

        model = lorica.adapt(self.load(folder, kind), lorica.LoraConfig(target_modules="all-linear"), seed=0)
        rows: Any = [{"input_ids": row, "labels": row} for row in tokens(4)]
        arguments = transformers.TrainingArguments(
            str(tmp_path / "run"),
            max_steps=6,
            eval_steps=2,
            eval_strategy="steps",
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            gradient_checkpointing=checkpointing,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,  # pyright: ignore
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0] - 0.1
        lorica.save(model, tmp_path / "adapter")
        y = logits(model)
        assert torch.equal(logits(lorica.load(self.load(folder, kind), tmp_path / "adapter")), y)

    def test_merged_and_saved(self, folder: Path, tmp_path: Path, kind: str) -> None:
        import transformers

        model = lorica.adapt(self.load(folder, kind), lorica.LoraConfig(r=2, target_modules="all-linear"))
        shake(model, size=0.05)
        y = logits(model)
        for into in ("dequantized", "quantized"):
            lorica.merge(model, into=into)
            merged = logits(model)
            tolerance = {"dequantized": 1e-5 if kind == "nf4" else 0.02, "quantized": 0.5}[into]
            assert (merged - y).norm() < tolerance * y.norm()
            model.save_pretrained(tmp_path / into)  # pyright: ignore[reportCallIssue]
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / into).eval()
            assert hasattr(again.config, "quantization_config") == (into == "quantized")
            # In evaluation bitsandbytes may round the scales of a model without adapters to bfloat16.
            torch.testing.assert_close(logits(again), merged, rtol=0.05, atol=0.05)
            lorica.restore(model)
            assert torch.equal(logits(model), y)
        assert model.is_quantized  # pyright: ignore[reportAttributeAccessIssue]

    def test_parameters_are_counted_as_numbers_not_as_bytes(self, folder: Path, kind: str) -> None:
        import transformers

        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
        count = lorica.trainable_parameters(self.load(folder, kind))
        assert count.total == sum(p.numel() for p in plain.parameters())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """bitsandbytes remarks on every input that it casts."""
    import logging

    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=tokens()).logits
