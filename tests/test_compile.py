"""Compilers, exporters, and the parallel and checkpointing wrappers of torch, around an adapted model."""

from __future__ import annotations

import copy
import gc
import socket
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from tiny import Toy, batch, tokens, transformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lorica
from lorica import LoraConfig
from lorica.errors import StateError

EVERYTHING = ("embed", "up", "down", "head")


def step(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    """The output, and every gradient of a training step."""
    model.zero_grad()
    y = model(*args)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **grads}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(expected) > 1
    assert {name.removeprefix("_orig_mod.").removeprefix("module.") for name in got} == set(expected)
    torch.testing.assert_close(list(got.values()), list(expected.values()), rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("unchecked_shapes")
class TestCompile:
    @pytest.mark.parametrize("targets", [("up", "down", "head"), EVERYTHING])
    def test_forward_and_backward_in_one_graph(self, targets: tuple[str, ...]) -> None:
        model, _ = oracle.adapted(Toy(), *targets)
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(step(compiled, tokens()), step(model, tokens()))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
    def test_by_the_default_compiler(self) -> None:
        model, _ = oracle.adapted(Toy(blocks=1), "up", "down")
        compiled: Any = torch.compile(model, fullgraph=True)
        assert_same(step(compiled, tokens()), step(model, tokens()))

    @pytest.mark.parametrize("targets", [("conv",), ("self_attn", "linear1", "linear2")])
    def test_layers_that_kernels_read(self, targets: tuple[str, ...]) -> None:
        model, _ = oracle.adapted(
            nn.ModuleDict(
                {
                    "conv": nn.Conv1d(5, 5, 3, padding=1),
                    "encoder": nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
                }
            ),
            *targets,
        )

        def run(x: Tensor) -> Tensor:
            return model["encoder"](model["conv"](x))

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 5, 8)
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-4, atol=1e-5)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), run(x), rtol=1e-4, atol=1e-5)

    def test_dropout(self) -> None:
        model, before = oracle.adapted(nn.Sequential(nn.Linear(64, 64)), "0", lora_dropout=0.25)
        with torch.no_grad():
            A, B = model[0].factor_parameters("default")
            A[:], B[:] = torch.eye(4, 64) * 2, torch.eye(64, 4)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.ones(2000, 64, requires_grad=True)
        y = compiled(x)
        update = (y - before(x))[:, :4]
        kept = update.abs() > 1e-3
        assert abs(kept.double().mean().item() - 0.75) < 0.03
        torch.testing.assert_close(update, kept * (1.5 * 2 / 0.75), rtol=1e-4, atol=1e-4)
        (dx,) = torch.autograd.grad(update.sum(), x)
        torch.testing.assert_close(dx[:, :4], update, rtol=1e-4, atol=1e-4)  # the same mask

    def test_another_active_adapter_is_seen(self) -> None:
        model, _ = oracle.adapted(Toy(blocks=1), "up", name="a")
        oracle.adapted(model, "up", "down", name="b", r=2)
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for names in (["a"], ["b"], ["a", "b"], [], ["a"], ["b"]):
            lorica.active(model, names)
            torch.testing.assert_close(compiled(tokens()), model(tokens()))
        assert counter.frame_count == 4  # one graph for each choice, and none again

    def test_merged_it_compiles_as_the_base_does(self) -> None:
        model, _ = oracle.adapted(Toy(), *EVERYTHING)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = compiled(tokens())
        lorica.merge(model)
        torch.testing.assert_close(compiled(tokens()), expected)
        lorica.restore(model)
        torch.testing.assert_close(compiled(tokens()), expected)

    def test_adapting_what_is_compiled_already(self) -> None:
        model = Toy()
        model.compile(fullgraph=True, backend="aot_eager")
        base = model(tokens())
        oracle.adapted(model, *EVERYTHING)
        got = model(tokens())
        assert not torch.allclose(got, base)
        torch.testing.assert_close(got, model.forward(tokens()))

    @pytest.mark.parametrize("rows", ["fixed", "dynamic"])
    def test_export(self, rows: str) -> None:
        model, _ = oracle.adapted(Toy(), *EVERYTHING)
        model.eval()
        shapes = ({0: torch.export.Dim("rows", min=2)},) if rows == "dynamic" else None
        program = torch.export.export(model, (tokens(),), dynamic_shapes=shapes)
        x = tokens(5 if rows == "dynamic" else 3)
        torch.testing.assert_close(program.module()(x), model(x))
        assert "blocks.0.up.lora_A.default.weight" in program.state_dict


class TestFunctionalCall:
    def test_the_factors_can_be_given(self) -> None:
        model, _ = oracle.adapted(Toy(), *EVERYTHING)
        twin, _ = oracle.adapted(copy.deepcopy(lorica.detach(copy.deepcopy(model))), *EVERYTHING)
        given = {name: p.detach() for name, p in twin.named_parameters() if "lora_" in name}
        torch.testing.assert_close(torch.func.functional_call(model, given, tokens()), twin(tokens()))

    def test_gradients_by_function(self) -> None:
        model, _ = oracle.adapted(Toy(), *EVERYTHING)
        factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(factors: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, factors, tokens()).square().sum()

        got = torch.func.grad(loss)(factors)
        model(tokens()).square().sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(got, expected)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
class TestDistributed:
    def test_data_parallel(self) -> None:
        model, _ = oracle.adapted(Toy(), *EVERYTHING)
        expected = step(model, tokens())
        parallel = nn.parallel.DistributedDataParallel(model)
        assert_same(step(parallel, tokens()), expected)
        assert list(lorica.extract(parallel).factors) == list(lorica.extract(model).factors)

    def test_adapting_after_data_parallel(self) -> None:
        model = Toy()
        parallel = nn.parallel.DistributedDataParallel(model)
        before = dict(model.state_dict())
        compiled: Any = torch.compile(parallel, backend="eager")
        for wrapped in (parallel, model, compiled, nn.Sequential(parallel)):
            with pytest.raises(StateError, match="was wrapped in DistributedDataParallel"):
                lorica.adapt(wrapped, LoraConfig(target_modules=["up"]))
            assert dict(model.state_dict()).keys() == before.keys()
        adapter = lorica.extract(lorica.adapt(Toy(), LoraConfig(target_modules=["up"]), seed=0))
        lorica.attach(parallel, adapter, "frozen")
        assert lorica.extract(parallel).factors.keys() == adapter.factors.keys()
        with pytest.raises(StateError, match="was wrapped in DistributedDataParallel"):
            lorica.adapt(parallel, LoraConfig(target_modules=["up"]), "later")
        del parallel, wrapped, compiled
        gc.collect()
        lorica.adapt(model, LoraConfig(target_modules=["up"]), "later")

    def test_fully_shard(self) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        model, _ = oracle.adapted(Toy(), *EVERYTHING)
        expected = step(model, tokens())
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            for layer in block.values():
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        got = step(model, tokens())
        assert isinstance(got["head.lora_A.default.weight"], DTensor)
        assert_same({k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in got.items()}, expected)

    def test_adapting_after_fully_shard_is_refused(self) -> None:
        from torch.distributed.fsdp import fully_shard

        model = Toy()
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(StateError, match="is already sharded; adapt the model before fully_shard"):
            lorica.adapt(model, LoraConfig(target_modules=["up"]))
        assert not lorica.adapters(model)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
class TestGradientCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_of_a_transformers_model(self, reentrant: bool, dropout: float) -> None:
        def run(checkpointed: bool) -> dict[str, Tensor]:
            model: Any = transformer("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            oracle.adapted(model, "query", "value", "dense", lora_dropout=dropout)
            model.train()
            calls: list[int] = []
            model.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: calls.append(1))
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                # Reentrant checkpoints only reach parameters through an input that has a gradient.
                model.enable_input_require_grads()
            torch.manual_seed(3)
            y = model(**batch()).last_hidden_state
            (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
            assert len(calls) == 1 + checkpointed  # the forward pass is really run again
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        expected = run(checkpointed=False)
        assert any(grad.abs().max() > 1e-3 for grad in expected.values())
        torch.testing.assert_close(run(checkpointed=True), expected)
