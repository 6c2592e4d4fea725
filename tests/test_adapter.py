"""The adapter as a value."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import update
from torch import Tensor

import lorica
from lorica import Adapter, Factors, LoraConfig
from lorica.errors import AdapterError
from lorica.state import check_name


def adapter(**extras: Tensor) -> Adapter:
    factors = {
        "a": Factors(torch.randn(2, 5), torch.randn(3, 2), 0.5),
        "b": Factors(torch.randn(4, 5), torch.randn(3, 4), 2.0),
    }
    return Adapter(LoraConfig(), factors, extras)


class TestNorm:
    @given(d_out=st.integers(1, 12), r=st.integers(1, 16), d_in=st.integers(1, 12), scale=st.floats(-4, 4))
    def test_that_of_the_product(self, d_out: int, r: int, d_in: int, scale: float) -> None:
        A, B = torch.randn(r, d_in, dtype=torch.float64), torch.randn(d_out, r, dtype=torch.float64)
        assert Factors(A, B, scale).norm() == pytest.approx((scale * B @ A).norm().item(), rel=1e-9)

    def test_of_a_convolution(self) -> None:
        A, B = torch.randn(2, 3, 5, 5), torch.randn(4, 2, 1, 1)
        update = torch.einsum("or,rikl->oikl", B[..., 0, 0], A)
        assert Factors(A, B, 0.5, "conv").norm() == pytest.approx(0.5 * update.norm().item(), rel=1e-5)

    def test_of_a_convolution_in_groups(self) -> None:
        factors = Factors(torch.randn(6, 4, 5), torch.randn(9, 2, 1), 0.5, "conv")
        assert factors.groups == 3
        assert factors.norm() == pytest.approx(float(update(factors).norm()))
        B, A = factors.blocks()
        assert (B.shape, A.shape) == ((3, 3, 2), (3, 2, 20))

    def test_zero_at_the_start(self) -> None:
        assert Factors(torch.randn(2, 5), torch.zeros(3, 2), 1.0).norm() == 0

    def test_neither_precision_nor_gradients_get_in_the_way(self) -> None:
        A, B = torch.randn(2, 5), torch.randn(3, 2, requires_grad=True)
        expected = Factors(A.bfloat16().float(), B.bfloat16().float(), 1.0).norm()
        assert Factors(A.bfloat16(), B.bfloat16(), 1.0).norm() == pytest.approx(expected)


def test_the_rank_is_read_off_A() -> None:
    assert Factors(torch.empty(7, 5), torch.empty(3, 7), 1.0).r == 7


def test_names_counts_and_bytes() -> None:
    value = adapter(**{"head.bias": torch.zeros(3, dtype=torch.bfloat16)})
    assert list(value.named_tensors()) == ["a (A)", "a (B)", "b (A)", "b (B)", "head.bias"]
    assert value.numel == 2 * (5 + 3) + 4 * (5 + 3) + 3
    assert value.nbytes == 4 * (2 * 8 + 4 * 8) + 2 * 3


def test_it_can_be_read_from_the_top_of_the_package() -> None:
    assert (lorica.Adapter, lorica.Factors) == (Adapter, Factors)


class TestFinite:
    def test_finite_passes_whatever_the_dtype(self) -> None:
        adapter(steps=torch.tensor(3)).check_finite()
        adapter(turns=torch.ones(3, dtype=torch.complex64).conj()).check_finite()
        adapter(small=torch.ones(3).to(torch.float8_e4m3fn)).check_finite()

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2, torch.bfloat16])
    def test_what_is_not_is_found_in_any_dtype(self, dtype: torch.dtype) -> None:
        with pytest.raises(AdapterError, match="NaN or infinity in head;"):
            adapter(head=torch.tensor([1, math.nan]).to(dtype)).check_finite()

    def test_what_has_no_values_is_named(self) -> None:
        with pytest.raises(AdapterError, match="meta device, without values: head"):
            adapter(head=torch.ones(3, device="meta")).check_finite()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_all_that_is_not_is_named(self, bad: float) -> None:
        value = adapter(head=torch.ones(3))
        value.factors["b"].A[1, 2] = bad
        value.extras["head"][0] = bad
        with pytest.raises(AdapterError, match=r"NaN or infinity in b \(A\), head;"):
            value.check_finite()


class TestNames:
    @pytest.mark.parametrize("name", ["default", "sentiment-2", "a_b", "7", "naïve"])
    def test_accepted(self, name: str) -> None:
        assert check_name(name) == name

    @pytest.mark.parametrize("name", ["", "a.b", "../up", "a/b", "a\\b", "a b", "a\n", "~", None, 3])
    def test_what_cannot_be_part_of_a_parameters_name_or_a_folders(self, name: object) -> None:
        with pytest.raises(AdapterError, match="letters, digits"):
            check_name(name)  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize(
        "name", ["keys", "pop", "training", "forward", "_modules", "copy", "get", "setdefault"]
    )
    def test_what_torchs_own_containers_refuse_as_a_key(self, name: str) -> None:
        with pytest.raises(AdapterError, match="choose another name"):
            check_name(name)

    @given(st.text(max_size=8))
    def test_every_accepted_name_can_be_a_key_of_both_containers(self, name: str) -> None:
        try:
            check_name(name)
        except AdapterError:
            return
        torch.nn.ModuleDict()[name] = torch.nn.Identity()
        torch.nn.ParameterDict()[name] = torch.nn.Parameter(torch.zeros(1))
