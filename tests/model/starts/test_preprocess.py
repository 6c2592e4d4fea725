"""Showing a model data: what CorDA and LoRA-GA find in it, and that no trace is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Toy, outputs, shake, transformer
from torch import Tensor, nn

import lorica
from lorica import LoraConfig, inits
from lorica.errors import AdapterError, ConfigError, FileError, StateError, TargetError
from lorica.model import starts
from lorica.model.files import extract_live


def toy() -> Toy:
    torch.manual_seed(4)
    return Toy(dim=16).eval()


def batches(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(0, 40, (5, 9), generator=draw) for _ in range(count)]


def config(value: str, **settings: Any) -> LoraConfig:
    fields: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["up", "down"],
        "init_lora_weights": value,
    }
    return LoraConfig(**fields | settings)


def stepping(model: nn.Module, count: int = 3) -> Callable[[], None]:
    def step() -> None:
        for tokens in batches(count):
            model(tokens).logsumexp(1).sum().backward()

    return step


def prepare(model: nn.Module, value: str, **settings: Any) -> LoraConfig:
    chosen = config(value, **settings)
    if value == "corda":
        starts.preprocess_corda(model, chosen, batches())
    else:
        starts.preprocess_loraga(model, chosen, stepping(model))
    return chosen


@pytest.mark.parametrize("value", ["corda", "lora_ga"])
class TestBoth:
    def test_the_model_computes_what_it_did_and_gets_its_base_back(self, value: str) -> None:
        model, before = toy(), toy().state_dict()
        lorica.adapt(model, prepare(model, value))
        torch.testing.assert_close(outputs(model), outputs(toy()), rtol=1e-5, atol=1e-5)
        assert not torch.equal(model.state_dict()["blocks.0.up.weight"], before["blocks.0.up.weight"])
        lorica.detach(model)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())

    def test_a_saved_adapter_is_an_update_of_the_untouched_base(self, value: str, tmp_path: Path) -> None:
        model = toy()
        lorica.adapt(model, prepare(model, value))
        shake(model)
        lorica.save(model, tmp_path)
        torch.testing.assert_close(
            outputs(lorica.load(toy(), tmp_path)), outputs(model), rtol=1e-5, atol=1e-5
        )
        resumed = lorica.load(toy(), tmp_path, trainable=True)
        assert torch.equal(outputs(resumed), outputs(model))

    @pytest.mark.parametrize("training", [True, False])
    def test_no_trace_is_left(self, value: str, training: bool) -> None:
        model = toy()
        model.train(training)
        model.norm.train(not training)
        model.head.weight.requires_grad_(False)
        model.embed.weight.grad = gradient = torch.ones_like(model.embed.weight)
        modes = [module.training for module in model.modules()]
        trains = [parameter.requires_grad for parameter in model.parameters()]
        prepare(model, value)
        assert modes == [module.training for module in model.modules()]
        assert trains == [parameter.requires_grad for parameter in model.parameters()]
        assert model.embed.weight.grad is gradient
        assert all(p.grad is None for p in model.parameters() if p is not model.embed.weight)
        hooked = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert not hooked
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    def test_nor_when_it_fails(self, value: str) -> None:
        model = toy()

        def fail() -> None:
            model(batches()[0])
            raise RuntimeError("no more data")

        function = starts.preprocess_corda if value == "corda" else starts.preprocess_loraga
        with pytest.raises(RuntimeError, match="no more data"):
            function(model, config(value), fail)
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not model.training
        with pytest.raises(StateError, match="before adapting"):
            lorica.adapt(model, config(value))

    def test_it_serves_one_adapter_of_the_same_rank(self, value: str) -> None:
        model = toy()
        chosen = prepare(model, value)
        with pytest.raises(StateError, match="for r=3, and now r=2"):
            lorica.adapt(model, chosen.replace(r=2))
        lorica.adapt(model, chosen)
        with pytest.raises(StateError, match="before adapting"):
            lorica.adapt(model, chosen, "second")

    def test_alpha_may_still_change(self, value: str) -> None:
        model = toy()
        lorica.adapt(model, prepare(model, value).replace(lora_alpha=3, use_rslora=True))
        torch.testing.assert_close(outputs(model), outputs(toy()), rtol=1e-5, atol=1e-5)

    def test_refusals(self, value: str) -> None:
        function: Any = starts.preprocess_corda if value == "corda" else starts.preprocess_loraga
        with pytest.raises(ConfigError, match="set it to"):
            function(toy(), config("pissa"), batches())
        with pytest.raises(TargetError, match="is for linear layers"):
            function(toy(), config(value, target_modules=["embed"]), batches())
        with pytest.raises(AdapterError, match="the data loader is empty"):
            function(toy(), config(value), [])
        adapted = lorica.adapt(toy(), LoraConfig(target_modules=["up"]))
        with pytest.raises(AdapterError, match="'default' is active"):
            function(adapted, config(value), batches())

    def test_files(self, value: str, tmp_path: Path) -> None:
        file = str(tmp_path / "cache" / "file.pt")
        made, read = toy(), toy()
        for model in (made, read):
            if value == "corda":
                chosen = config(value, corda_config={"cache_file": file})
                starts.preprocess_corda(model, chosen, batches() if model is made else None)
            else:
                chosen = config(value)
                starts.preprocess_loraga(model, chosen, stepping(made) if model is made else [], file)
            lorica.adapt(model, chosen)
        ours, theirs = made.state_dict(), read.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        Path(file).write_bytes(b"not a file of torch's")
        function: Any = starts.preprocess_corda if value == "corda" else starts.preprocess_loraga
        with pytest.raises(FileError, match="cannot be read"):
            function(toy(), chosen, *(() if value == "corda" else ([], file)))
        torch.save({"other": torch.zeros(1)}, file)
        with pytest.raises(FileError, match="belongs to another model"):
            function(toy(), chosen, *(() if value == "corda" else ([], file)))


class TestCorda:
    @pytest.mark.parametrize("method", ["ipm", "kpm"])
    def test_the_start_is_the_oriented_decomposition_of_the_layers_inputs(self, method: Any) -> None:
        model = toy()
        seen: list[Tensor] = []
        handle = model.blocks[0]["up"].register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))  # type: ignore[index]
        for tokens in batches():
            model(tokens)
        handle.remove()
        rows = [(x.flatten(0, 1) / x.max().abs()) for x in seen]
        C = sum((x.T @ x for x in rows), torch.zeros(16, 16)) / len(rows)
        lorica.adapt(model, prepare(model, "corda", corda_config={"corda_method": method}))
        factors = extract_live(model).factors["blocks.0.up"]
        A, B = inits.orient(toy().get_parameter("blocks.0.up.weight").detach(), C, 3, method).factors(2.0)
        torch.testing.assert_close(factors.B @ factors.A, B @ A, rtol=1e-3, atol=1e-4)

    def test_covariances_serve_any_rank(self, tmp_path: Path) -> None:
        file = str(tmp_path / "covariances.pt")
        starts.preprocess_corda(toy(), config("corda", corda_config={"covariance_file": file}), batches())
        model = toy()
        chosen = config("corda", r=5, corda_config={"covariance_file": file})
        starts.preprocess_corda(model, chosen)
        lorica.adapt(model, chosen)
        direct = toy()
        starts.preprocess_corda(direct, config("corda", r=5), batches())
        lorica.adapt(direct, config("corda", r=5))
        assert torch.equal(
            extract_live(model).factors["blocks.1.up"].A, extract_live(direct).factors["blocks.1.up"].A
        )

    def test_neither_data_nor_file(self) -> None:
        with pytest.raises(ConfigError, match="run_model is needed"):
            starts.preprocess_corda(toy(), config("corda"))

    def test_a_layer_that_is_never_called_is_named(self) -> None:
        with pytest.raises(AdapterError, match=r"blocks\.0\.up: it was never called"):
            starts.preprocess_corda(toy(), config("corda"), lambda: None)


class TestLoraGA:
    def test_one_step_goes_where_full_fine_tuning_goes(self) -> None:
        """The first change of each weight lies along its gradient, more than from the usual start."""
        reference = toy().train()
        stepping(reference)()
        full = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}

        def alignment(model: nn.Module, name: str) -> float:
            model.train()
            before = {path: f.B @ f.A * f.scale for path, f in extract_live(model).factors.items()}
            stepping(model)()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-4 * parameter.grad
            after = extract_live(model).factors[name]
            change = after.B @ after.A * after.scale - before[name]
            gradient = full[f"{name}.weight"]
            return float(-(change * gradient).sum() / (change.norm() * gradient.norm()))

        for name in ("blocks.0.up", "blocks.1.down"):
            model, usual = toy(), lorica.adapt(toy(), config("lora_ga").replace(init_lora_weights=True))
            lorica.adapt(model, prepare(model, "lora_ga"))
            assert alignment(model, name) > max(0.8, alignment(usual, name) + 0.1)

    def test_batches_with_a_loss_do_without_a_function(self) -> None:
        tokens = batches()
        inputs = [{"input_ids": t, "labels": t} for t in tokens]
        chosen = LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights="lora_ga")
        one, other = transformer("gpt2"), transformer("gpt2")
        for model in (one, other):
            model.config.attn_pdrop = 0
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0
        starts.preprocess_loraga(one, chosen, inputs)
        starts.preprocess_loraga(other, chosen, lambda: [other(**i).loss.backward() for i in inputs])
        for model in (one, other):
            lorica.adapt(model, chosen, seed=0)
        assert torch.equal(outputs(one, "gpt2"), outputs(other, "gpt2"))

    def test_batches_without_a_loss_are_refused(self) -> None:
        with pytest.raises(AdapterError, match="gives no loss"):
            starts.preprocess_loraga(toy(), config("lora_ga"), batches())

    def test_a_weight_without_gradient_is_named(self) -> None:
        with pytest.raises(AdapterError, match=r"no gradient came to blocks\.0\.up"):
            starts.preprocess_loraga(toy(), config("lora_ga"), lambda: None)

    def test_a_gradient_that_is_not_finite_is_named(self) -> None:
        model = toy()
        with pytest.raises(AdapterError, match=r"gradient of blocks\..* holds NaN"):
            starts.preprocess_loraga(
                model, config("lora_ga"), lambda: (model(batches()[0]).sum() * torch.nan).backward()
            )

    def test_twice_the_rank_must_fit(self) -> None:
        with pytest.raises(TargetError, match="at r=9 needs 18 directions"):
            starts.preprocess_loraga(toy(), config("lora_ga", r=9), batches())


class TestData:
    """`adapt(data=)`: what PEFT's two steps give, in one."""

    @pytest.mark.parametrize("value", ["corda", "lora_ga"])
    def test_in_one_step(self, value: str) -> None:
        one, two = toy(), toy()
        lorica.adapt(two, prepare(two, value), seed=3)
        given: Any = batches() if value == "corda" else stepping(one)
        lorica.adapt(one, config(value), data=given, seed=3)
        ours, theirs = one.state_dict(), two.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    def test_refused_where_the_start_looks_at_none(self) -> None:
        model = toy()
        with pytest.raises(ConfigError, match="init_lora_weights='pissa' looks at none; leave data out"):
            lorica.adapt(model, config("pissa"), data=batches())
        with pytest.raises(ConfigError, match="data= is for starts of LoRA alone"):
            lorica.adapt(model, lorica.BitFitConfig(), data=batches())
        assert not lorica.adapters(model)
