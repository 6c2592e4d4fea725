"""The fused forward and backward against the plain one: outputs and all gradients, any shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jaxtyping
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lorica.functional import dropout, lora_linear, low_rank
from lorica.kernels import masks as drawing
from lorica.kernels.masks import drop_rate, keep_mask, packed, unpacked

NAMES = ("x", "weight", "bias", "A", "B")
# Largest relative error (Frobenius) against float64: a few roundings of the activations' dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class Operands(NamedTuple):
    """What `lora_linear` takes, in its order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor

    def named(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._asdict().items() if t is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        return Operands(*(None if t is None else function(t) for t in self))  # pyright: ignore[reportArgumentType]


def operands(
    leading: tuple[int, ...] = (3, 4),
    d_in: int = 8,
    d_out: int = 6,
    r: int = 3,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    masters: torch.dtype | None = None,
    trained: tuple[str, ...] = NAMES,
) -> Operands:
    """Normal draws; `masters` is the dtype of A and B where it is another."""

    def draw(name: str, *shape: int) -> Tensor:
        own = masters if masters and name in ("A", "B") else dtype
        return torch.randn(shape, dtype=torch.float64).to(own).requires_grad_(name in trained)

    return Operands(
        draw("x", *leading, d_in),
        draw("weight", d_out, d_in),
        draw("bias", d_out) if bias else None,
        draw("A", r, d_in),
        draw("B", d_out, r),
    )


def run(function: Callable[..., Tensor], given: Operands, *rest: Any) -> dict[str, Tensor]:
    """The output and the gradients asked for, of a loss that weighs every output differently."""
    y = function(*given, *rest)
    asked = {f"d{name}": t for name, t in given.named().items() if t.requires_grad}
    if not asked:
        return {"y": y}
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return {"y": y, **dict(zip(asked, torch.autograd.grad(y, list(asked.values()), weights), strict=True))}


def in_float64(given: Operands) -> Operands:
    return given.map(lambda t: t.detach().double().requires_grad_(t.requires_grad))


def keep_of(x: Tensor, p: float, seed: int) -> Tensor | None:
    """The mask that a call draws right after `seed`, divided by the rate kept."""
    if p == 0:
        return None
    torch.manual_seed(seed)
    return keep_mask(x.reshape(-1, x.shape[-1]), p).view(x.shape).double() / (1 - drop_rate(p))


def check(given: Operands, scale: float, p: float, dtype: torch.dtype) -> None:
    """Compare with the oracle in float64; gradients must have their own tensor's dtype and shape."""
    torch.manual_seed(7)
    got = run(lora_linear, given, scale, p)
    expected = run(oracle.lora_linear, in_float64(given), scale, keep_of(given.x, p, seed=7))
    sources = given.named()
    assert got.keys() == expected.keys()
    assert got["y"].dtype == dtype
    for name, value in got.items():
        assert value.shape == expected[name].shape
        assert name == "y" or value.dtype == sources[name[1:]].dtype, name
        error, size = (value.double() - expected[name]).norm(), expected[name].norm()
        assert error <= TOLERANCE[dtype] * size.clamp_min(1e-3), f"{name} is off by {error:.2e} of {size:.2e}"


@given(
    leading=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 12),
    r=st.integers(1, 16),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    scale=st.sampled_from([0.25, 1.0, 2.0]),
    trained=st.sets(st.sampled_from(NAMES)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_shape_and_any_set_of_gradients(
    leading: tuple[int, ...],
    d_in: int,
    d_out: int,
    r: int,
    bias: bool,
    p: float,
    scale: float,
    trained: set[str],
    dtype: torch.dtype,
) -> None:
    given = operands(leading, d_in, d_out, r, bias=bias, dtype=dtype, trained=tuple(trained))
    check(given, scale, p, dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "masters"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_any_dtype_and_masters_of_higher_precision(
    dtype: torch.dtype, masters: torch.dtype, p: float
) -> None:
    check(operands((4, 5), 32, 24, 8, dtype=dtype, masters=masters), 0.5, p, dtype)


@pytest.mark.parametrize(
    "trained", [NAMES, ("A", "B"), ("x", "A", "B"), ("A",), ("B",), ("x",), ("weight", "bias")]
)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gradcheck(trained: tuple[str, ...], p: float) -> None:
    given = operands((2, 2), 4, 3, 2, dtype=torch.float64, trained=trained)

    def same_mask_each_time(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return lora_linear(*Operands(*tensors), 1.5, p)

    assert torch.autograd.gradcheck(same_mask_each_time, [t for t in given if t is not None])


def test_inputs_in_any_memory_layout() -> None:
    given = Operands(
        x=torch.randn(8, 5, 3).transpose(0, 2),
        weight=torch.randn(8, 6).t(),
        bias=torch.randn(6, 2)[:, 0],
        A=torch.randn(8, 2).t(),
        B=torch.randn(6, 4)[:, ::2],
    ).map(Tensor.requires_grad_)
    assert not any(t.is_contiguous() for t in given.named().values())
    check(given, 0.5, 0.2, torch.float32)


def test_an_expanded_gradient_comes_back_right() -> None:
    given = operands()
    plain = in_float64(given)
    lora_linear(*given, 0.5).sum().backward()
    oracle.lora_linear(*plain, 0.5).sum().backward()
    for name, t in given.named().items():
        torch.testing.assert_close(t.grad, plain.named()[name].grad, check_dtype=False)


def test_the_input_is_left_as_it_was() -> None:
    given = operands()
    before = given.map(lambda t: t.detach().clone()).named()
    y = lora_linear(*given, 0.5, 0.5)
    dy = torch.ones_like(y)
    y.backward(dy)
    assert torch.equal(dy, torch.ones_like(y))
    assert all(torch.equal(before[name], t) for name, t in given.named().items())


@pytest.mark.parametrize("leading", [(), (3,), (3, 4)])
def test_what_follows_may_work_in_place_on_the_output(leading: tuple[int, ...]) -> None:
    given = operands(leading)
    y = lora_linear(*given, 0.5)
    assert not y._is_view()
    y.relu_().sum().backward()
    plain = in_float64(given)
    oracle.lora_linear(*plain, 0.5).relu().sum().backward()
    for name, t in given.named().items():
        torch.testing.assert_close(t.grad, plain.named()[name].grad, check_dtype=False)


def kept_bytes(given: Operands, p: float) -> dict[int, int]:
    """What a call keeps for backward: address → bytes."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        lora_linear(*given, 0.5, p)
    return kept


@pytest.mark.parametrize(("p", "mask_bytes"), [(0.0, 0), (0.5, 12 * 8 // 8)])
def test_backward_keeps_only_the_input_the_thin_product_and_a_bit_of_mask(p: float, mask_bytes: int) -> None:
    given = operands((12,), d_in=8, d_out=6, r=3)
    own = {t.untyped_storage().data_ptr() for t in given.named().values()}
    kept = kept_bytes(given, p)
    assert sum(size for address, size in kept.items() if address not in own) == mask_bytes + 12 * 3 * 4


def test_a_checkpointed_block_does_not_take_its_last_product_again() -> None:
    w = operands((16,), 32, 32, 1, bias=False, trained=("x", "A", "B"))

    def block(x: Tensor) -> Tensor:
        return lora_linear(lora_linear(x, *w[1:], 2.0, 0.3), *w[1:], 2.0, 0.3)

    def flops(y: Tensor) -> int:
        with FlopCounterMode(display=False) as counted:
            y.sum().backward()
        return counted.get_total_flops()

    once, again = flops(block(w.x)), flops(checkpoint(block, w.x, use_reentrant=False))
    product = 2 * 16 * 32 * 32
    assert product < again - once < 1.5 * product  # the first layer's; the rest is r = 1


def test_backward_does_not_keep_an_input_that_no_gradient_needs() -> None:
    given = operands(trained=("x", "B"))
    assert given.x.untyped_storage().data_ptr() not in kept_bytes(given, 0.0)


class TestDropout:
    @given(rows=st.integers(0, 9), d=st.integers(1, 9), library=st.booleans())
    def test_a_mask_is_kept_as_bits_and_comes_back(self, rows: int, d: int, library: bool) -> None:
        mask = keep_mask(torch.empty(rows, d), 0.5)
        with pytest.MonkeyPatch.context() as patch:
            if not library:
                patch.setattr(drawing, "numpy", None)
            bits = packed(mask)
            assert bits is not None
            assert bits.numel() == (-(-rows * d // 8) if library else rows * d)
            again = unpacked(bits, mask.shape)
        assert again is not None
        assert torch.equal(again, mask)

    @given(p=st.floats(0, 1, exclude_max=True))
    def test_the_rate_drawn_is_the_nearest_of_256(self, p: float) -> None:
        assert abs(drop_rate(p) - p) <= 1 / 256
        assert (drop_rate(p) == 0) == (p == 0)
        assert drop_rate(p) < 1

    @pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
    def test_every_byte_of_a_draw_drops_at_that_rate(self, p: float) -> None:
        kept = keep_mask(torch.empty(1 << 14, 8), p).double().mean(0)
        rate = drop_rate(p)
        deviation = math.sqrt(rate * (1 - rate) / (1 << 14))
        assert ((kept - (1 - rate)).abs() < 5 * deviation).all()

    @pytest.mark.parametrize("with_numpy", [True, False])
    def test_masks_follow_from_the_default_generator(
        self, with_numpy: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not with_numpy:
            monkeypatch.setattr(drawing, "numpy", None)
        like = torch.empty(64, 100)
        masks = []
        for _ in range(2):
            torch.manual_seed(3)
            masks += [keep_mask(like, 0.25), keep_mask(like, 0.25)]
        assert masks[0].equal(masks[2])
        assert masks[1].equal(masks[3])
        # Of two independent masks 0.75² + 0.25² of the elements agree.
        assert abs((masks[0] == masks[1]).double().mean().item() - 0.625) < 0.04

    @pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 0)])
    def test_a_mask_of_any_shape(self, shape: tuple[int, ...]) -> None:
        mask = keep_mask(torch.empty(shape), 0.5)
        assert mask.shape == shape
        assert set(mask.unique().tolist()) <= {0, 1}

    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_what_is_kept_is_scaled_by_the_rate_really_drawn(self, p: float) -> None:
        y = dropout(torch.ones(100_000, dtype=torch.float64), p)
        assert set(y.unique().tolist()) == {0.0, 1 / (1 - drop_rate(p))}
        assert abs(y.mean().item() - 1) < 0.02

    def test_none_at_zero(self) -> None:
        x = torch.randn(3)
        assert dropout(x, 0.0) is x

    @staticmethod
    def masks(tokens: int, d: int, p: float = 0.5) -> Tensor:
        """The masks of one call, made visible by W = 0 and A = B = 1."""
        one = torch.eye(d)
        return lora_linear(torch.ones(tokens, d), torch.zeros(d, d), None, one, one, 1.0, p) != 0

    def test_every_token_has_its_own_mask(self) -> None:
        masks = self.masks(64, 256)
        alike = (masks[:, None] == masks[None]).double().mean(-1)
        alike.fill_diagonal_(0.5)
        assert (alike - 0.5).abs().max() < 0.2

    def test_every_call_has_its_own_mask(self) -> None:
        assert not torch.equal(self.masks(4, 64), self.masks(4, 64))

    def test_the_seed_fixes_the_mask(self) -> None:
        torch.manual_seed(5)
        first = self.masks(4, 64)
        torch.manual_seed(5)
        assert torch.equal(first, self.masks(4, 64))

    def test_backward_uses_the_mask_of_forward(self) -> None:
        d = 64
        one = torch.eye(d)
        x = torch.ones(5, d, requires_grad=True)
        y = lora_linear(x, torch.zeros(d, d), None, one, one, 2.0, 0.5)
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, y)  # both are 2·mask / (1 − rate)


class TestAutocast:
    def test_as_torchs_own_linear(self) -> None:
        given = operands((4, 5), 32, 24, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(lora_linear, given, 0.5)
            assert got["y"].dtype == F.linear(given.x, given.weight).dtype == torch.bfloat16
        expected = run(oracle.lora_linear, in_float64(given), 0.5)
        for name, value in got.items():
            assert value.dtype == (torch.bfloat16 if name == "y" else torch.float32)
            assert (value.double() - expected[name]).norm() <= 4e-2 * expected[name].norm()

    @pytest.mark.parametrize("p", [0.0, 0.1])
    def test_a_backward_pass_under_it_of_a_forward_pass_outside(self, p: float) -> None:
        given, along = operands((4, 5), 32, 24, 8), torch.randn(4, 5, 24)
        asked = list(given.named().values())
        torch.manual_seed(0)
        expected = torch.autograd.grad(lora_linear(*given, 0.5, p), asked, along)
        torch.manual_seed(0)
        y = lora_linear(*given, 0.5, p)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = torch.autograd.grad(y, asked, along)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    def test_float64_stays_as_in_torchs_own_linear(self) -> None:
        given = operands(dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(lora_linear(*given, 0.5), oracle.lora_linear(*given, 0.5))

    def test_a_device_without_autocast(self) -> None:
        given = operands().map(lambda t: t.to("meta"))
        assert lora_linear(*given, 0.5, 0.1).shape == (3, 4, 6)

    def test_the_update_alone_has_the_dtype_of_its_input(self) -> None:
        x, A, B = torch.randn(2, 8).bfloat16(), torch.randn(3, 8), torch.randn(6, 3)
        assert low_rank(x, A, B, 0.5).dtype == torch.bfloat16


class TestTransforms:
    @pytest.mark.filterwarnings(
        "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
    )  # torch's own use
    @pytest.mark.parametrize("grad", [True, False])
    def test_forward_mode(self, grad: bool) -> None:
        given = operands(dtype=torch.float64).map(Tensor.detach)
        expected = oracle.lora_linear(*given, 0.5)
        step = oracle.lora_linear(*given.map(lambda t: t + 1e-6 * t.cos()), 0.5)
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            duals = given.map(lambda t: forward_ad.make_dual(t, t.cos()))
            y, dy = forward_ad.unpack_dual(lora_linear(*duals, 0.5))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dy, (step - expected) / 1e-6, rtol=1e-4, atol=1e-4)

    def test_grad(self) -> None:
        given = operands()
        x, weight, bias, A, B = given.map(Tensor.detach)

        def loss(A: Tensor, B: Tensor) -> Tensor:
            return lora_linear(x, weight, bias, A, B, 0.5).square().sum()

        got = torch.func.grad(loss, argnums=(0, 1))(A, B)
        lora_linear(*given, 0.5).square().sum().backward()
        torch.testing.assert_close(got, (given.A.grad, given.B.grad))

    def test_gradients_of_each_example(self) -> None:
        xs, weight, bias, A, B = operands((5, 4)).map(Tensor.detach)

        def loss(A: Tensor, x: Tensor) -> Tensor:
            return lora_linear(x, weight, bias, A, B, 0.5).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(A, xs)
        torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(A, x) for x in xs]))

    def test_many_adapters_at_once(self) -> None:
        x, weight, bias, _, _ = operands().map(Tensor.detach)
        A, B = torch.randn(7, 3, 8), torch.randn(7, 6, 3)
        each = torch.func.vmap(lora_linear, in_dims=(None, None, None, 0, 0, None))
        y = each(x, weight, bias, A, B, 0.5)
        torch.testing.assert_close(y[6], oracle.lora_linear(x, weight, bias, A[6], B[6], 0.5))

    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_dropout_follows_the_randomness_asked_for(self, randomness: str) -> None:
        one = torch.eye(64)

        def update(x: Tensor) -> Tensor:
            return lora_linear(x, torch.zeros(64, 64), None, one, one, 1.0, 0.5)

        y = torch.func.vmap(update, randomness=randomness)(torch.ones(3, 2, 64))
        assert torch.equal(y[0], y[1]) == (randomness == "same")

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_jvp(self) -> None:
        given = operands(dtype=torch.float64).map(Tensor.detach)
        given, tangents = tuple(given), tuple(given.map(lambda t: torch.randn_like(t)))
        got = torch.func.jvp(lambda *t: lora_linear(*Operands(*t), 0.5), given, tangents)
        expected = torch.func.jvp(lambda *t: oracle.lora_linear(*Operands(*t), 0.5), given, tangents)
        torch.testing.assert_close(got, expected)


def test_a_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises((RuntimeError, jaxtyping.TypeCheckError)):
        lora_linear(*operands()._replace(A=torch.ones(3, 7)), 0.5)
