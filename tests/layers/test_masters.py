"""Copies in float32 of modules in half precision: they train so, and compute as the base would."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import bits
from torch import Tensor, nn

import lorica
from lorica.peft import LoraConfig as PeftConfig
from lorica.peft import get_peft_model

HALVES = [torch.float16, torch.bfloat16]


class Deep(nn.Module):
    """A head of several parts, with a parameter of its own, a buffer, and more than one tensor returned."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.full((3,), 0.25))

    def forward(self, x: Tensor, *, twice: bool = False) -> dict[str, Tensor]:
        y = self.out(self.norm(x.to(self.out.weight.dtype))) * self.gain + self.shift
        return {"logits": y + y if twice else y, "scores": y.float().softmax(-1)}


class Net(nn.Module):
    def __init__(self, head: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.head = head(8, 3) if head is nn.Linear else head()

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.a(x)))


def with_head(dtype: torch.dtype, head: type[nn.Module] = nn.Linear, name: str = "default") -> Any:
    config = lorica.LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"])
    return lorica.adapt(Net(head).to(dtype), config, name)


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def trained(model: Any, amount: float = 1e-3) -> Any:
    """Every trained value moved, by less than half precision could tell."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn_like(parameter)
    return model


def tensors(found: Any) -> list[Tensor]:
    return list(found.values()) if isinstance(found, dict) else [found]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head", [nn.Linear, Deep])
def test_copies_are_float32_and_compute_by_their_values_in_the_bases_dtype(
    dtype: torch.dtype, head: type[nn.Module]
) -> None:
    model = trained(with_head(dtype, head))
    own = model.head.modules_to_save["default"]
    assert {p.dtype for p in own.parameters()} == {torch.float32}
    plain = copy.deepcopy(own).to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    for came, expected in zip(tensors(model.head(x)), tensors(plain(x)), strict=True):
        assert came.dtype == expected.dtype
        assert torch.equal(came, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head", [nn.Linear, Deep])
def test_a_scaler_steps_where_the_base_is_in_half_precision(
    dtype: torch.dtype, head: type[nn.Module]
) -> None:
    model = with_head(dtype, head)
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    own = model.head.modules_to_save["default"]
    before = {name: p.detach().clone() for name, p in own.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with torch.autocast("cpu", dtype):
        loss = nn.functional.cross_entropy(tensors(model(x.to(dtype)))[0].float(), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter, before[name] - 1e-3 * parameter.grad)
        assert not torch.equal(parameter, before[name])


def test_the_gradient_is_the_rounded_weights_own() -> None:
    model = trained(with_head(torch.bfloat16))
    own = model.head.modules_to_save["default"]
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    model.head(x).sum().backward()
    plain = copy.deepcopy(own).to(torch.bfloat16)
    plain.zero_grad()
    plain(x).sum().backward()
    assert own.weight.grad.dtype == torch.float32
    assert torch.equal(own.weight.grad, plain.weight.grad.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head", [nn.Linear, Deep])
def test_merging_rounds_once_and_restoring_is_exact(dtype: torch.dtype, head: type[nn.Module]) -> None:
    model = trained(with_head(dtype, head))
    base, x = state(Net(head).to(dtype)), torch.randn(4, 8, dtype=dtype)
    own = model.head.modules_to_save["default"]
    masters = {name: p.detach().clone() for name, p in own.named_parameters()}
    unmerged = tensors(model.head(x))
    for _ in range(2):
        lorica.merge(model)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(map(torch.equal, tensors(model.head(x)), unmerged))
        for name, parameter in model.head.named_parameters():
            assert torch.equal(parameter, masters[name].to(dtype))
        lorica.restore(model)
        assert all(torch.equal(p, masters[name]) for name, p in own.named_parameters())
        assert all(p.requires_grad for p in own.parameters())
    lorica.detach(model)
    assert state(model) == base


def test_switching_goes_to_the_other_copys_rounded_values_and_back() -> None:
    model = trained(with_head(torch.float16, name="one"))
    config = lorica.LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"])
    lorica.adapt(model, config, "two")
    x = torch.randn(4, 8).half()
    expected = {}
    for name in ("one", "two"):
        lorica.active(model, name)
        expected[name] = model.head(x)
    for name in ("two", "one", "two"):
        lorica.switch(model, name)
        assert torch.equal(model.head(x), expected[name])
    lorica.restore(model)
    masters = [model.head.modules_to_save[name].weight for name in ("one", "two")]
    assert all(weight.dtype == torch.float32 for weight in masters)
    assert not torch.equal(masters[0], masters[0].half().float())


def test_what_is_written_reads_back_to_the_bit_and_files_in_the_bases_dtype_load(tmp_path: Path) -> None:
    model = trained(with_head(torch.float16))
    lorica.save(model, tmp_path)
    again: Any = lorica.load(Net().half(), tmp_path)
    one, two = (m.head.modules_to_save["default"] for m in (model, again))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    old = lorica.read(tmp_path)
    extras = {name: tensor.half() for name, tensor in old.extras.items()}
    older: Any = lorica.attach(Net().half(), lorica.Adapter(old.config, old.factors, extras))
    x = torch.randn(4, 8).half()
    assert torch.equal(older.head(x), model.head(x))
    assert older.head.modules_to_save["default"].weight.dtype == torch.float32


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64])
def test_a_model_moved_to_another_dtype_computes_in_that_one(other: torch.dtype) -> None:
    model = trained(with_head(torch.bfloat16)).to(other)
    own = model.head.modules_to_save["default"]
    x = torch.randn(4, 8, dtype=other)
    assert model(x).dtype == other
    assert torch.equal(model.head(x), nn.functional.linear(x, own.weight, own.bias))
    lorica.disabled(model)
    assert model(x).dtype == other


def test_moved_while_merged() -> None:
    model = trained(with_head(torch.float16))
    lorica.merge(model)
    lorica.restore(model.float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.randn(4, 8)).dtype == torch.float32


def test_an_input_fitted_to_the_dtype_that_the_weight_shows() -> None:
    model = trained(with_head(torch.float16))
    x = torch.randn(4, 8).half()
    assert torch.equal(model.head(x.to(model.head.weight.dtype)), model.head(x))


def test_rows_with_adapters_of_their_own() -> None:
    model = trained(with_head(torch.float16, name="one"))
    x = torch.randn(3, 8).half()
    mine = model(x)
    lorica.disabled(model)
    base = model(x)
    with lorica.mixed(model, ["one", None, "one"]):
        found = model(x)
    assert torch.equal(found, torch.stack([mine[0], base[1], mine[2]]))


def test_copies_stay_tied_where_the_base_ties() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.head[1].weight = self.head[0].weight

    config = lorica.LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"])
    model: Any = trained(lorica.adapt(Tied().half(), config))
    x = torch.randn(4, 8).half()
    own = model.head.modules_to_save["default"]
    assert own[0].weight is own[1].weight
    model.head(x).sum().backward()
    assert own[0].weight.grad is not None
    unmerged = model.head(x)
    lorica.merge(model)
    assert model.head[0].weight is model.head[1].weight
    assert torch.equal(model.head(x), unmerged)


@pytest.mark.parametrize("raised", [True, False])
def test_the_drop_in_takes_the_bases_dtype_where_it_is_asked_to(raised: bool) -> None:
    config = PeftConfig(r=2, target_modules=["a"], modules_to_save=["head"])
    model: Any = get_peft_model(Net().half(), config, autocast_adapter_dtype=raised)
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {torch.float32 if raised else torch.float16}
    assert model(torch.randn(4, 8).half()).dtype == torch.float16


def test_a_copy_whose_weights_are_read_past_it_keeps_the_bases_dtype() -> None:
    layer: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.bfloat16)
    config = lorica.LoraConfig(r=2, target_modules=["linear1"], modules_to_save=["linear2"])
    model: Any = lorica.adapt(layer, config).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.linear2.modules_to_save["default"].weight.dtype == torch.bfloat16


def test_a_recurrent_module_trains_in_the_bases_dtype() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(8, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x[None])[0][0]

    model = with_head(torch.bfloat16, Recurrent)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    assert {p.dtype for p in model.head.modules_to_save.parameters()} == {torch.bfloat16}


def test_in_float32_the_copy_itself_is_called() -> None:
    model = with_head(torch.float32)
    seen: list[Any] = []
    own = model.head.modules_to_save["default"]
    own.register_forward_hook(lambda module, *_: seen.append(module))
    model(torch.randn(4, 8))
    assert seen == [own]


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_compiled_model_trains_its_copy() -> None:
    model = trained(with_head(torch.bfloat16))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    model(x).float().sum().backward()
    weight = model.head.modules_to_save["default"].weight
    expected, weight.grad = weight.grad, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).float().sum().backward()
    torch.testing.assert_close(weight.grad, expected, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()


def test_a_copy_of_the_model_and_its_pickle_keep_the_masters() -> None:
    model = trained(with_head(torch.float16))
    x = torch.randn(4, 8).half()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin(x).sum().backward()
    assert twin.head.modules_to_save["default"].weight.grad is not None
    assert model.head.modules_to_save["default"].weight.grad is None


def test_threads_that_call_one_copy_each_get_its_gradient() -> None:
    model = trained(with_head(torch.bfloat16))
    own, x = model.head.modules_to_save["default"].weight, torch.randn(64, 8, dtype=torch.bfloat16)
    model.head(x).sum().backward()
    expected = own.grad.clone()

    def gradients(index: int) -> list[Tensor]:
        if index % 2:  # beside threads that need no graph
            with torch.no_grad():
                return [model.head(x) for _ in range(50)][:0]
        return [torch.autograd.grad(model.head(x).sum(), own)[0] for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        found = [gradient for each in pool.map(gradients, range(8)) for gradient in each]
    assert len(found) == 200
    assert all(torch.equal(gradient, expected) for gradient in found)


@pytest.mark.parametrize("head", [nn.Linear, Deep])
def test_a_model_whose_values_accelerate_keeps_elsewhere(head: type[nn.Module]) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = trained(with_head(torch.bfloat16, head))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = tensors(model(x))
        moved = accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
        assert all(map(torch.equal, tensors(moved(x)), expected))
