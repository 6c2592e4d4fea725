"""`nn.Linear` and transformers' Conv1D."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.layers import LoraConv1D, LoraLinear, LoraOpaque


def conv1d(d_in: int, d_out: int, bias: bool = True) -> nn.Module:
    transformers = pytest.importorskip("transformers.pytorch_utils")
    assert bias, "Conv1D always has one"
    return transformers.Conv1D(d_out, d_in)


def linear(d_in: int, d_out: int, bias: bool = True) -> nn.Module:
    return nn.Linear(d_in, d_out, bias=bias)


Make = Callable[..., nn.Module]
kinds = pytest.mark.parametrize(("make", "kind"), [(linear, LoraLinear), (conv1d, LoraConv1D)])


@kinds
@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_shape(make: Make, kind: type, leading: tuple[int, ...]) -> None:
    model, before = oracle.adapted(nn.Sequential(make(8, 6)), "0")
    assert isinstance(model[0], kind)
    x = torch.randn(*leading, 8, requires_grad=True)
    if x.numel():
        oracle.assert_as_folded(model, before, x)
    else:
        assert model(x).shape == before(x).shape


def test_conv1d_calls_its_input_x() -> None:
    model, _ = oracle.adapted(nn.Sequential(conv1d(8, 6)), "0")
    x = torch.randn(3, 8)
    assert torch.equal(model[0](x=x), model[0](x))


def test_a_single_vector() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Linear(8, 6)), "0")
    assert oracle.assert_as_folded(model, before, torch.randn(8, requires_grad=True)).shape == (6,)


def test_without_bias() -> None:
    model, before = oracle.adapted(nn.Sequential(linear(8, 6, bias=False)), "0")
    oracle.assert_as_folded(model, before, torch.randn(3, 8))


def test_a_rank_beyond_both_dimensions() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Linear(3, 2)), "0", r=9)
    oracle.assert_as_folded(model, before, torch.randn(4, 3, requires_grad=True))


@kinds
def test_several_adapters_add_up(make: Make, kind: type) -> None:
    model, before = oracle.adapted(nn.Sequential(make(8, 6)), "0", name="a", r=2)
    oracle.adapted(model, "0", name="b", r=5, lora_alpha=1)
    oracle.adapted(model, "0", name="c")
    x = torch.randn(3, 8, requires_grad=True)
    for names in (["a"], ["b"], ["a", "b"], ["c", "b", "a"]):
        with lorica.active(model, names):
            oracle.assert_as_folded(model, before, x, names=names)
    with lorica.disabled(model):
        assert torch.equal(model(x), before(x))


def test_an_adapter_that_leaves_a_layer_out_does_not_act_there() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "0", name="a")
    oracle.adapted(model, "1", name="b")
    x = torch.randn(3, 8)
    for names in (["a"], ["b"], ["a", "b"]):
        with lorica.active(model, names):
            oracle.assert_as_folded(model, before, x, names=names)


def test_only_the_acting_adapter_gets_gradients() -> None:
    model, _ = oracle.adapted(nn.Sequential(nn.Linear(8, 6)), "0", name="a")
    oracle.adapted(model, "0", name="b")
    model(torch.randn(3, 8)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "0.lora_A.b.weight",
        "0.lora_B.b.weight",
    }


def test_bfloat16_base_with_float32_factors() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Linear(32, 16, dtype=torch.bfloat16)), "0")
    A, B = model[0].factor_parameters("default")
    assert A.dtype == B.dtype == torch.float32
    x = torch.randn(4, 32).bfloat16()
    y = model(x)
    assert y.dtype == torch.bfloat16
    exact = oracle.lora_linear(
        x.double(), before[0].weight.double(), before[0].bias.double(), A.double(), B.double(), 1.5
    )
    assert (y - exact).norm() < 0.02 * exact.norm()
    y.sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32


def test_float64_base_with_float64_factors() -> None:
    model, before = oracle.adapted(nn.Sequential(nn.Linear(8, 6, dtype=torch.float64)), "0")
    assert model[0].factor_parameters("default")[0].dtype == torch.float64
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.func.functional_call(before, oracle.folded(model, before), x))


class TestDropout:
    @pytest.fixture
    def model(self) -> nn.Module:
        """Three projections of one input, whose updates are the dropped input itself."""
        model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("query", "key", "value")})
        oracle.adapted(model, "query", "key", "value", r=64, lora_alpha=64, lora_dropout=0.5)
        with torch.no_grad():
            for projection in model.values():
                nn.init.zeros_(projection.base_weight)  # pyright: ignore[reportArgumentType, reportCallIssue]
                nn.init.zeros_(projection.bias)  # pyright: ignore[reportArgumentType]
                for factor in projection.factor_parameters("default"):  # pyright: ignore[reportCallIssue]
                    nn.init.eye_(factor)
        return model

    @staticmethod
    def masks(model: nn.Module, tokens: int = 8) -> dict[str, Tensor]:
        x = torch.ones(2, tokens, 64)
        return {name: projection(x) != 0 for name, projection in model.named_children()}

    def test_query_key_and_value_have_masks_of_their_own(self, model: nn.Module) -> None:
        query, key, value = self.masks(model).values()
        for one, other in ((query, key), (query, value), (key, value)):
            assert abs((one == other).double().mean().item() - 0.5) < 0.1

    def test_so_have_rows_tokens_and_steps(self, model: nn.Module) -> None:
        first, second = self.masks(model)["query"], self.masks(model)["query"]
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])
        assert first.flatten(0, 1).unique(dim=0).shape[0] == 16

    def test_none_in_evaluation(self, model: nn.Module) -> None:
        model.eval()
        assert all(mask.all() for mask in self.masks(model).values())

    def test_each_active_adapter_drops_for_itself(self) -> None:
        model, _ = oracle.adapted(nn.Sequential(nn.Linear(64, 64)), "0", name="a", lora_dropout=0.5)
        oracle.adapted(model, "0", name="b", lora_dropout=0.0)
        x = torch.randn(2, 64)
        assert torch.equal(model(x), model(x))
        lorica.active(model, ["a", "b"])
        assert not torch.equal(model(x), model(x))


class Renamed(nn.Linear):
    """A subclass without a forward of its own."""


class Doubling(nn.Linear):
    """A subclass with one, and with an argument of its own."""

    def forward(self, x: Tensor, times: float = 2.0) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x) * times


class TestSubclasses:
    def test_one_without_a_forward_of_its_own_takes_the_fast_path(self) -> None:
        model, before = oracle.adapted(nn.Sequential(Renamed(8, 6)), "0")
        assert isinstance(model[0], LoraLinear)
        assert isinstance(model[0], Renamed)
        oracle.assert_as_folded(model, before, torch.randn(3, 8, requires_grad=True))

    def test_one_with_its_own_keeps_it_and_the_update_is_added(self) -> None:
        model, before = oracle.adapted(nn.Sequential(Doubling(8, 6)), "0")
        assert isinstance(model[0], LoraOpaque)
        assert isinstance(model[0], Doubling)
        x = torch.randn(3, 8, requires_grad=True)
        y, expected = (
            model[0](x, times=3.0),
            before[0](x, times=3.0) + x @ oracle.delta(model[0], "default").T,
        )
        torch.testing.assert_close(y, expected)
        asked = [x, *model[0].factor_parameters("default")]
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), asked), torch.autograd.grad(expected.sum(), asked)
        )

    def test_several_adapters_on_one(self) -> None:
        model, before = oracle.adapted(nn.Sequential(Doubling(8, 6)), "0", name="a")
        oracle.adapted(model, "0", name="b")
        lorica.active(model, ["a", "b"])
        x = torch.randn(3, 8)
        delta = oracle.delta(model[0], "a") + oracle.delta(model[0], "b")
        torch.testing.assert_close(model(x), before(x) + x @ delta.T)

    def test_dropout_of_one(self) -> None:
        model, before = oracle.adapted(nn.Sequential(Doubling(8, 6)), "0", lora_dropout=0.5)
        x = torch.randn(3, 8)
        assert not torch.equal(model(x), model(x))
        torch.testing.assert_close(model.eval()(x), before(x) + x @ oracle.delta(model[0], "default").T)

    def test_a_lower_precision_than_its_factors(self) -> None:
        model, before = oracle.adapted(nn.Sequential(Doubling(8, 6, dtype=torch.bfloat16)), "0")
        x = torch.randn(3, 8).bfloat16()
        y = model(x)
        assert y.dtype == torch.bfloat16
        exact = before(x).double() + x.double() @ oracle.delta(model[0], "default").double().T
        assert (y.double() - exact).norm() < 0.02 * exact.norm()
