"""`target_parameters`: updates of parameters that a module's own forward reads, against sums of products."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import record, shake
from torch import Tensor, nn

import lorica
import lorica.algebra
from lorica.errors import AdapterError, ConfigError, StateError, TargetError
from lorica.layers import LoraParameters


class Experts(nn.Module):
    """A mixture of experts: every token goes through every expert. The weights are stacked."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((3, 4, 6), (3, 6, 4)) if transposed else ((3, 6, 4), (3, 4, 6))
        self.up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))
        self.gate = nn.Parameter(torch.randn(3, 4))
        self.reads = 0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        weights = (x @ self.gate.T).softmax(-1)
        for e in range(3):
            up, down = self.up_proj[e], self.down_proj[e]
            if not self.is_transposed:
                up, down = up.T, down.T
            y = y + weights[:, e : e + 1] * (torch.tanh(x @ up) @ down)
        return y


class Model(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x))


ALL = ["experts.up_proj", "experts.down_proj", "experts.gate"]


def config(**more: Any) -> lorica.LoraConfig:
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": ALL}
    return lorica.LoraConfig(**fields | more)


def make(*names: str, transposed: bool = False, **more: Any) -> tuple[Any, Any, Tensor]:
    """A model with these adapters, the model before that, and an input."""
    before: Any = Model(transposed)
    model = copy.deepcopy(before)
    for i, name in enumerate(names):
        lorica.adapt(model, config(**more), name, seed=i)
        with lorica.active(model, name):
            shake(model, i)
    return model, before, torch.randn(5, 4)


def folded(model: Any, before: Any, *names: str) -> dict[str, Tensor]:
    """Every adapted parameter with its experts' own products added, expert after expert; differentiable."""
    result = {}
    for leaf in ("up_proj", "down_proj", "gate"):
        W = before.experts.get_parameter(leaf)
        for name in names:
            update = model.experts.lora_parameters[leaf]
            A, B = update.lora_A[name].weight, update.lora_B[name].weight
            count = W.shape[0] if W.dim() == 3 else 1
            r = A.shape[0] // count
            deltas = [1.5 * B[:, e::count] @ A[e * r : (e + 1) * r] for e in range(count)]
            if before.experts.is_transposed and W.dim() == 3:
                deltas = [delta.T for delta in deltas]
            W = W + torch.stack(deltas).reshape(W.shape)
        result[f"experts.{leaf}"] = W
    return result


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_outputs_and_gradients(names: tuple[str, ...], transposed: bool) -> None:
    model, before, x = make(*names, transposed=transposed)
    lorica.active(model, names)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6 * len(names)
    y = model(x)
    expected = torch.func.functional_call(before, folded(model, before, *names), (x,))
    torch.testing.assert_close(y, expected)
    gradients = (torch.autograd.grad(result.square().sum(), trained) for result in (y, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    with lorica.disabled(model):
        assert torch.equal(model(x), before(x))


def test_many_calls_add_one_update_each_and_never_write_to_the_base() -> None:
    model, before, x = make("one")
    first = model(x)
    for _ in range(3):
        assert torch.equal(model(x), first)
    for leaf in ("up_proj", "down_proj", "gate"):
        assert torch.equal(model.experts._parameters[leaf], before.experts.get_parameter(leaf))


def test_a_parameter_is_folded_once_for_a_call_and_not_kept() -> None:
    model, _, x = make("one")
    shown = []
    model.experts.register_forward_pre_hook(lambda module, args: shown.append(module.up_proj))
    model(x)
    host = model.experts
    assert host._shown is None
    host._shown = {}
    assert host.up_proj is host.up_proj
    host._shown = None
    assert host.up_proj is not host.up_proj
    assert torch.equal(shown[0], host.up_proj)


def test_an_adapter_starts_as_the_base_with_the_range_of_one_expert() -> None:
    model, before, x = make()
    lorica.adapt(model, config(), seed=0)
    assert torch.equal(model(x), before(x))
    A = model.experts.lora_parameters["up_proj"].lora_A["default"].weight
    assert A.shape == (6, 4)
    assert 0.4 < A.abs().max() <= 0.5  # 1 / √d_in
    wide, _, _ = make()
    lorica.adapt(wide, config(init_lora_weights="gaussian", r=200), seed=0)
    A = wide.experts.lora_parameters["up_proj"].lora_A["default"].weight
    torch.testing.assert_close(A.std(), torch.tensor(1 / 200), rtol=0.1, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_merged_switched_and_restored(transposed: bool) -> None:
    model, _, x = make("one", "two", transposed=transposed)
    lorica.active(model, "one")
    before = record(model)
    with torch.no_grad():
        one = model(x)
        with lorica.active(model, "two"):
            two = model(x)
        report = lorica.merge(model, "one")
        assert type(model.experts) is Experts
        torch.testing.assert_close(model(x), one)
        assert report.worst[1] < 1e-6
        lorica.switch(model, "two")
        torch.testing.assert_close(model(x), two)
        lorica.restore(model)
    assert record(model) == before


def test_all_linear_layers_beside_another_adapters_parameters() -> None:
    model, x = Model(), torch.randn(5, 4)
    before = model(x)
    lorica.adapt(model, config(), "experts")
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules="all-linear"), "linear")
    shake(model)
    assert [*lorica.extract(model, "linear").factors] == ["first"]
    factors = lorica.extract(model, "linear").factors["first"]
    with lorica.disabled(model):
        torch.testing.assert_close(model(x), before)
    y = model.first.weight @ x.T + factors.scale * factors.B @ factors.A @ x.T + model.first.bias[:, None]
    torch.testing.assert_close(model.first(x), y.T)


def test_detached_the_model_is_as_it_was() -> None:
    base = Model()
    before = record(base)
    lorica.adapt(base, config(), "one")
    lorica.adapt(base, config(), "two")
    lorica.detach(base, "one")
    assert isinstance(base.experts, LoraParameters)
    lorica.detach(base)
    assert record(base) == before


def test_files_there_and_back(tmp_path: Path) -> None:
    model, before, x = make("one", target_modules=["first"])
    lorica.save(model, tmp_path)
    assert sorted(lorica.read(tmp_path).factors) == [
        "experts",
        "experts.base_layer",
        "experts.base_layer.base_layer",
        "first",
    ]
    again = lorica.load(copy.deepcopy(before), tmp_path)
    assert torch.equal(again(x), model(x))
    lorica.load_weights(again, tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(again))(x), model(x))


def test_several_widths_of_rank(tmp_path: Path) -> None:
    one = ["experts.down_proj"]
    model, before, x = make(
        "one", target_parameters=one, rank_pattern={"down_proj": 1}, alpha_pattern={"down_proj": 2}
    )
    assert model.experts.lora_parameters["down_proj"].lora_A["one"].weight.shape == (3, 6)
    lorica.save(model, tmp_path)
    assert torch.equal(lorica.load(copy.deepcopy(before), tmp_path)(x), model(x))
    model, _, _ = make("one", rank_pattern={"down_proj": 1})
    lorica.save(model, tmp_path)
    back = lorica.read(tmp_path)
    for path, f in lorica.extract(model).factors.items():
        assert back.factors[path].shares(f)


def test_counted() -> None:
    model, _, _ = make("one")
    assert lorica.trainable_parameters(model).trainable == 2 * 3 * (4 + 6) * 2 + 2 * (4 + 3)


class TestRefused:
    @pytest.mark.parametrize("more", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
    def test_what_a_parameter_has_no_place_for(self, more: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(more))} does not go with target_parameters"):
            config(**more)

    @pytest.mark.parametrize(
        ("more", "problem"),
        [
            ({"target_parameters": ["experts.upproj"]}, r"'experts.upproj'.*did you mean 'experts.up_proj'"),
            ({"target_parameters": ["first.bias"]}, r"first.bias is torch.float32 of shape \(4,\)"),
            (
                {"target_modules": ["first"], "target_parameters": ["first.weight"]},
                "first: targeted as a module",
            ),
            ({"layers_to_transform": [0]}, "layers_to_transform chooses among target_modules only"),
        ],
    )
    def test_by_the_name_of_the_parameter(self, more: dict[str, Any], problem: str) -> None:
        model, _, _ = make()
        before = record(model)
        with pytest.raises(TargetError, match=problem):
            lorica.adapt(model, config(**more))
        assert record(model) == before

    def test_a_module_and_its_parameter_by_two_adapters(self) -> None:
        model, _, _ = make()
        lorica.adapt(model, config(target_parameters=["first.weight"]), "one")
        with pytest.raises(TargetError, match="first: another adapter adapts parameters of it"):
            lorica.adapt(model, config(target_modules=["first"], target_parameters=None), "two")
        lorica.detach(model)
        lorica.adapt(model, config(target_modules=["first"], target_parameters=None), "two")
        with pytest.raises(TargetError, match=r"first.weight: another adapter has made first a LoraLinear"):
            lorica.adapt(model, config(target_parameters=["first.weight"]), "one")

    def test_rows_of_their_own(self) -> None:
        model, _, _ = make("one")
        with pytest.raises(StateError, match="experts is read past its layer"):
            lorica.mixed(model, ["one", None])

    def test_a_file_that_does_not_fit(self, tmp_path: Path) -> None:
        model, before, _ = make("one")
        lorica.save(model, tmp_path)
        small = copy.deepcopy(before)
        small.experts.up_proj = nn.Parameter(torch.zeros(2, 6, 4))
        fresh = record(small)
        with pytest.raises(AdapterError, match=r"shape of experts.up_proj: A \(6, 4\)"):
            lorica.load(small, tmp_path)
        assert record(small) == fresh


def test_a_linear_layers_weight_read_as_a_parameter() -> None:
    model, before, x = make("one", target_parameters=["first.weight"])
    update = model.first.lora_parameters["weight"]
    W = before.first.weight + 1.5 * update.lora_B["one"].weight @ update.lora_A["one"].weight
    torch.testing.assert_close(model(x), before.experts(x @ W.T + before.first.bias))


def test_a_recurrent_layer_keeps_no_graph_of_its_last_call() -> None:
    model: Any = nn.Sequential(nn.GRU(4, 3, batch_first=True))
    before, x = copy.deepcopy(model), torch.randn(2, 5, 4)
    lorica.adapt(model, config(target_parameters=["0.weight_ih_l0"], init_lora_weights=False))
    weights = {"0.weight_ih_l0": before[0].weight_ih_l0 + lorica.delta_weight(model, "0.weight_ih_l0")}
    y = model(x)[0]
    torch.testing.assert_close(y, torch.func.functional_call(before, weights, x)[0])
    assert not any(weight.grad_fn for weight in model[0]._flat_weights)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(x)[0], y)


@pytest.mark.parametrize(
    "work", [lorica.algebra.add, lambda adapter: lorica.algebra.compress(adapter, rank=1)]
)
def test_no_algebra_of_stacks(work: Any) -> None:
    model, _, _ = make("one")
    with pytest.raises(
        AdapterError, match=r"updates of parameters .* are not combined or compressed: experts"
    ):
        work(lorica.extract(model))
