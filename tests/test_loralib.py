"""loralib's layers where loralib itself is broken, and against the plain three-line forward."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import lora_linear
from tiny import bits
from torch import Tensor, nn

import lorica.loralib as lora
from lorica.errors import ConfigError

LAYERS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "linear": (lambda **kw: lora.Linear(6, 4, r=2, lora_alpha=3, **kw), torch.randn(5, 6)),
    "turned": (lambda **kw: lora.Linear(6, 4, r=2, fan_in_fan_out=True, **kw), torch.randn(5, 6)),
    "merged": (
        lambda **kw: lora.MergedLinear(6, 12, r=2, enable_lora=[True, False, True], **kw),
        torch.randn(5, 6),
    ),
    "embedding": (lambda **kw: lora.Embedding(7, 4, r=2, **kw), torch.tensor([[1, 2], [6, 0]])),
    "conv1d": (lambda **kw: lora.Conv1d(4, 6, 3, r=2, lora_alpha=3, **kw), torch.randn(2, 4, 7)),
    "conv2d": (lambda **kw: lora.Conv2d(4, 6, 3, r=2, groups=2, **kw), torch.randn(2, 4, 7, 7)),
    "conv3d": (lambda **kw: lora.Conv3d(4, 6, 3, r=2, **kw), torch.randn(2, 4, 5, 5, 5)),
}
every = pytest.mark.parametrize("name", LAYERS)


def make(name: str, **settings: Any) -> tuple[Any, Tensor]:
    """The layer with an update that is not zero, and an input."""
    layer, x = LAYERS[name][0](**settings), LAYERS[name][1]
    with torch.no_grad():
        layer.lora_A.normal_(0, 0.5)
        layer.lora_B.normal_(0, 0.5)
    return layer, x.to(layer.lora_A.dtype) if x.is_floating_point() else x


def weight_of(layer: Any) -> nn.Parameter:
    return getattr(layer, "conv", layer).weight


@every
class TestModes:
    """Merging on `eval()`."""

    def test_returns_the_layer(self, name: str) -> None:
        layer, _ = make(name)
        assert layer.train() is layer
        assert layer.eval() is layer
        assert layer.train(False) is layer

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_w0_comes_back_bit_for_bit(self, name: str, dtype: torch.dtype) -> None:
        layer, _ = make(name, dtype=dtype)
        before, parameter = bits(weight_of(layer)), weight_of(layer)
        for _ in range(20):
            layer.eval()
            assert bits(weight_of(layer)) != before
            assert layer.merged
            layer.train()
        assert bits(weight_of(layer)) == before
        assert weight_of(layer) is parameter
        assert not layer.merged

    def test_both_modes_compute_the_same(self, name: str) -> None:
        layer, x = make(name)
        expected = layer(x)
        assert not torch.allclose(expected, LAYERS[name][0]().train()(x), atol=1e-2)
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.eval().eval()(x), expected, rtol=1e-5, atol=1e-5)

    def test_the_merged_weight_is_rounded_once(self, name: str) -> None:
        layer, _ = make(name, dtype=torch.bfloat16)
        exact = copy.deepcopy(layer).double().eval()
        torch.testing.assert_close(weight_of(layer.eval()).double(), weight_of(exact), rtol=2**-8, atol=1e-9)

    def test_state_holds_w0_in_either_mode(self, name: str) -> None:
        layer, x = make(name)
        expected, before = layer(x), {key: bits(t) for key, t in layer.state_dict().items()}
        layer.eval()
        state = nn.Sequential(layer).state_dict(prefix="a.")
        assert {key.removeprefix("a.0."): bits(t) for key, t in state.items()} == before
        assert layer.merged
        fresh = LAYERS[name][0]()
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(fresh.eval()(x), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("assign", [False, True])
    def test_loads_while_it_evaluates(self, name: str, assign: bool) -> None:
        layer, x = make(name)
        target = nn.Sequential(LAYERS[name][0]().eval())
        target.load_state_dict(nn.Sequential(layer).state_dict(), assign=assign)
        for _ in range(2):
            torch.testing.assert_close(target(x), layer(x), rtol=1e-5, atol=1e-5)
            target.eval()
        assert target[0].merged  # type: ignore[union-attr]
        assert bits(weight_of(target.train()[0])) == bits(weight_of(layer))  # type: ignore[index]

    def test_moves_while_it_evaluates(self, name: str) -> None:
        layer, x = make(name)
        wide = x.double() if x.is_floating_point() else x
        expected = copy.deepcopy(layer).double()(wide)
        layer.eval().double()
        assert layer.merged
        torch.testing.assert_close(layer(wide), expected)
        torch.testing.assert_close(layer.train()(wide), expected)

    def test_pickles_in_either_mode(self, name: str) -> None:
        layer, x = make(name, **({} if name == "embedding" else {"lora_dropout": 0.5}))
        for mode in (False, True):
            layer.train(mode)
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            for twin in (
                pickle.loads(pickle.dumps(layer)),
                copy.deepcopy(layer),
                torch.load(file, weights_only=False),
            ):
                assert twin.merged is not mode
                torch.testing.assert_close(twin.eval()(x), copy.deepcopy(layer).eval()(x))
                assert bits(weight_of(twin.train())) == bits(weight_of(copy.deepcopy(layer).train()))

    def test_merging_can_be_switched_off(self, name: str) -> None:
        layer, x = make(name, merge_weights=False)
        before = bits(weight_of(layer))
        y = layer.eval()(x)
        assert bits(weight_of(layer)) == before
        torch.testing.assert_close(copy.deepcopy(layer).train()(x), y)

    def test_a_weight_that_trains_is_not_merged(self, name: str) -> None:
        layer, _ = make(name)
        weight_of(layer).requires_grad = True
        parameter = weight_of(layer)
        assert weight_of(layer.eval()) is parameter

    def test_what_becomes_of_the_weight_meanwhile(self, name: str) -> None:
        layer, _ = make(name)
        layer.eval()
        weight_of(layer).requires_grad = True
        assert weight_of(layer.train()).requires_grad
        weight_of(layer).requires_grad = False
        layer.eval()
        new = nn.Parameter(torch.zeros_like(weight_of(layer)), requires_grad=False)
        getattr(layer, "conv", layer).weight = new
        assert weight_of(layer.train()) is new

    def test_ties_hold(self, name: str) -> None:
        """Another layer that shares W0 does not get this one's update."""
        layer, _ = make(name)
        other = nn.Module()
        other.weight = weight_of(layer)
        before = bits(other.weight)
        layer.eval()
        assert bits(other.weight) == before

    def test_a_checkpoint_for_the_plain_model(self, name: str) -> None:
        layer, x = make(name)
        expected = layer(x)
        plain = {
            "linear": lambda: nn.Linear(6, 4),
            "turned": lambda: None,
            "merged": lambda: nn.Linear(6, 12),
            "embedding": lambda: nn.Embedding(7, 4),
            "conv1d": lambda: nn.Conv1d(4, 6, 3),
            "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
            "conv3d": lambda: nn.Conv3d(4, 6, 3),
        }[name]()
        states = [lora.merged_state_dict(nn.Sequential(layer.train(mode))) for mode in (True, False)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        if plain is None:
            assert states[0]["0.weight"].shape == (6, 4)
            return
        model = nn.Sequential(plain)
        model.load_state_dict(states[0])
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class TestArithmetic:
    """Against a forward of three lines."""

    @pytest.mark.parametrize("turned", [False, True])
    def test_linear(self, turned: bool) -> None:
        layer = lora.Linear(6, 4, r=2, lora_alpha=3, fan_in_fan_out=turned, dtype=torch.float64)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(3, 5, 6, dtype=torch.float64)
        W = layer.weight.T if turned else layer.weight
        expected = lora_linear(x, W, layer.bias, layer.lora_A, layer.lora_B, 1.5)
        torch.testing.assert_close(layer(x), expected)

    def test_merged_linear(self) -> None:
        layer = lora.MergedLinear(
            6, 12, r=2, lora_alpha=3, enable_lora=[False, True, True], dtype=torch.float64
        )
        nn.init.normal_(layer.lora_B)
        x = torch.randn(5, 6, dtype=torch.float64)
        parts = []
        for i, place in ((None, 0), (0, 1), (1, 2)):
            rows = slice(4 * place, 4 * place + 4)
            W, b = layer.weight[rows], layer.bias[rows]
            none = torch.zeros(0, 6), torch.zeros(4, 0)
            A, B = none if i is None else (layer.lora_A[2 * i : 2 * i + 2], layer.lora_B[4 * i : 4 * i + 4])
            parts.append(lora_linear(x, W, b, A.double(), B.double(), 1.5))
        torch.testing.assert_close(layer(x), torch.cat(parts, -1))

    @pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
    def test_convolutions(self, name: str) -> None:
        layer, x = make(name, dtype=torch.float64)
        update = (layer.lora_B @ layer.lora_A).reshape(layer.conv.weight.shape) * layer.scaling
        plain = copy.deepcopy(layer.conv)
        plain.weight.data += update
        torch.testing.assert_close(layer(x), plain(x))
        layer(x).sum().backward()
        assert bool(layer.lora_A.grad.abs().sum() > 0)
        assert bool(layer.lora_B.grad.abs().sum() > 0)

    @pytest.mark.parametrize("name", ["linear", "turned", "merged", "conv1d", "conv2d", "conv3d"])
    def test_dropout_acts_on_the_update_alone(self, name: str) -> None:
        layer, x = make(name, lora_dropout=0.5)
        exact, _ = make(name)
        exact.load_state_dict(layer.state_dict())
        torch.manual_seed(1)
        draws = torch.stack([layer(x) for _ in range(400)]).detach()
        assert not torch.equal(draws[0], draws[1])
        spread = draws.std(0) / 400**0.5
        assert bool(((draws.mean(0) - exact(x)).abs() <= 6 * spread + 1e-5).all())
        layer.lora_dropout.p = 0.0  # as scripts silence a model's dropout
        torch.testing.assert_close(layer(x), exact(x))
        layer.lora_dropout.p = 0.5
        layer.lora_dropout.eval()
        torch.testing.assert_close(layer(x), exact(x))

    def test_a_norm_is_the_tables_own(self) -> None:
        layer, x = make("embedding", max_norm=0.5)
        A, y = layer.lora_A.detach().clone(), layer(x)
        assert torch.equal(layer.lora_A, A)
        torch.testing.assert_close(layer.eval()(x), y)
        assert bool((layer.weight[x].norm(dim=-1) <= 0.5 + 1e-5).all())

    def test_sparse_tables_take_dense_updates(self) -> None:
        layer, x = make("embedding", sparse=True)
        layer(x).sum().backward()
        assert not layer.lora_A.grad.is_sparse


class TestMaking:
    """Constructors."""

    def test_a_given_table_stays(self) -> None:
        table = torch.randn(7, 4)
        layer = lora.Embedding(7, 4, r=2, _weight=table.clone())
        assert torch.equal(layer.weight, table)
        assert not layer.weight.requires_grad
        assert bool(layer.lora_B.abs().sum() > 0)
        assert torch.equal(lora.Embedding.from_pretrained(table).weight, table)

    @pytest.mark.parametrize("enable_lora", [[False], [False, False, False]])
    def test_nothing_enabled(self, enable_lora: list[bool]) -> None:
        layer = lora.MergedLinear(6, 12, r=2, enable_lora=enable_lora)
        x = torch.randn(5, 6)
        for mode in (True, False):
            assert torch.equal(layer.train(mode)(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert layer.weight.requires_grad

    def test_any_sequence_says_what_is_enabled(self) -> None:
        x = torch.randn(5, 6)
        states = lora.MergedLinear(6, 12, r=2, enable_lora=[True, False, True]).state_dict()
        layers = [
            lora.MergedLinear(6, 12, r=2, enable_lora=e)
            for e in ((True, False, True), torch.tensor([True, False, True]).tolist())
        ]
        for layer in layers:
            layer.load_state_dict(states)
        assert torch.equal(layers[0](x), layers[1](x))

    def test_equal_kernel_sizes_may_be_a_tuple(self) -> None:
        x = torch.randn(1, 2, 5, 5)
        layer = lora.Conv2d(2, 3, (3, 3), r=2)
        assert layer(x).shape == (1, 3, 3, 3)
        assert lora.Conv2d(2, 3, (3, 1))(x).shape == (1, 3, 3, 5)

    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_a_convolution_in_another_memory_layout(self, p: float) -> None:
        x, layer = torch.randn(1, 2, 5, 5), lora.Conv2d(2, 3, 3, r=2, lora_dropout=p)
        nn.init.normal_(layer.lora_B)
        same = copy.deepcopy(layer)
        same.conv.weight.data = same.conv.weight.data.to(memory_format=torch.channels_last)
        for training in (True, False, True):
            torch.manual_seed(0)
            expected = layer.train(training)(x)
            torch.manual_seed(0)
            torch.testing.assert_close(same.train(training)(x), expected)

    @pytest.mark.parametrize(
        ("make_layer", "message"),
        [
            (lambda: lora.Linear(6, 4, r=-1), "r must be a whole number of at least 0"),
            (lambda: lora.Linear(6, 4, r=1.5), "not 1.5"),  # type: ignore[arg-type]
            (lambda: lora.Linear(6, 4, r=1, lora_dropout=1.0), "lora_dropout must be a probability"),
            (lambda: lora.MergedLinear(6, 4, r=1, enable_lora=[True] * 3), "out_features=4 cannot be shared"),
            (lambda: lora.MergedLinear(6, 4, r=1, enable_lora=[]), "has 0 parts"),
            (lambda: lora.Conv2d(2, 3, (3, 1), r=2), r"one kernel size for all dimensions, not \(3, 1\)"),
        ],
    )
    def test_what_cannot_be(self, make_layer: Callable[[], nn.Module], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            make_layer()

    def test_a_layer_of_ones_own(self) -> None:
        class Own(nn.Linear, lora.LoRALayer):
            def __init__(self, size: int) -> None:
                nn.Linear.__init__(self, size, size)
                lora.LoRALayer.__init__(self, r=1, lora_alpha=1, lora_dropout=0.0, merge_weights=True)
                self.lora_A = nn.Parameter(torch.zeros(1, size))

        model = nn.Sequential(Own(3))
        lora.mark_only_lora_as_trainable(model, bias="lora_only")
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.lora_A", "0.bias"}
        assert model(torch.zeros(1, 3)).shape == (1, 3)


class Model(nn.Module):
    """A layer of each sort, and plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = lora.Linear(4, 4, r=2)
        self.unused = lora.Linear(4, 4)
        self.conv = lora.Conv1d(4, 4, 3, r=2)
        self.plain = nn.Linear(4, 4)


class TestHelpers:
    """What trains, and what is saved."""

    @pytest.mark.parametrize("mode", [True, False])
    @pytest.mark.parametrize(
        ("bias", "biases"),
        [
            ("none", set()),
            ("lora_only", {"linear.bias", "conv.conv.bias"}),
            ("all", {"linear.bias", "conv.conv.bias", "unused.bias", "plain.bias"}),
        ],
    )
    def test_what_trains_is_what_is_saved(self, bias: str, biases: set[str], mode: bool) -> None:
        model = Model().train(mode)
        lora.mark_only_lora_as_trainable(model, bias=bias)
        model.train()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == biases | {"linear.lora_A", "linear.lora_B", "conv.lora_A", "conv.lora_B"}
        assert lora.lora_state_dict(model.train(mode), bias=bias).keys() == trained

    def test_an_unknown_bias_changes_nothing(self) -> None:
        model = Model()
        before = [p.requires_grad for p in model.parameters()]
        for helper in (lora.mark_only_lora_as_trainable, lora.lora_state_dict):
            with pytest.raises(ConfigError, match="bias must be one of"):
                helper(model, bias="some")
        assert [p.requires_grad for p in model.parameters()] == before

    def test_a_layer_that_is_the_whole_model(self) -> None:
        layer = lora.Linear(4, 4, r=2)
        lora.mark_only_lora_as_trainable(layer, bias="lora_only")
        assert lora.lora_state_dict(layer, bias="lora_only").keys() == {"lora_A", "lora_B", "bias"}
        assert lora.merged_state_dict(layer).keys() == {"weight", "bias"}

    def test_merged_names_are_the_plain_models(self) -> None:
        assert lora.merged_state_dict(Model()).keys() == {
            f"{name}.{leaf}" for name in ("linear", "unused", "conv", "plain") for leaf in ("weight", "bias")
        }
