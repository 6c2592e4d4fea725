"""W0 + scale·B·A: what it is, and that its bits depend on nothing but the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from lorica.folding import each_on_one_thread, fold, fold_rows

COLUMNS = 700
ROWS = fold_rows(COLUMNS) + 21  # a whole block and a part


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def operands(dtype: torch.dtype, precision: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, COLUMNS), (ROWS, 3), (3, COLUMNS))
    weight, left, right = (torch.randn(shape, generator=draw, dtype=precision) for shape in shapes)
    return weight.to(dtype), left, right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_formed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    weight, left, right = operands(dtype, torch.float32)
    exact = weight.double() + 0.5 * (left.double() @ right.double())
    precise = fold(weight, left, right, 0.5)
    assert precise.dtype == torch.float32
    torch.testing.assert_close(precise.double(), exact, rtol=1e-6, atol=1e-5)
    stored = fold(weight, left, right, 0.5, out=torch.empty_like(weight))
    assert torch.equal(stored, precise.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_may_be_written_over_the_weight(dtype: torch.dtype) -> None:
    weight, left, right = operands(dtype, torch.promote_types(dtype, torch.float32))
    expected = fold(weight, left, right, 0.5, out=torch.empty_like(weight))
    assert fold(weight, left, right, 0.5, out=weight) is weight
    assert torch.equal(weight, expected)


def test_a_weight_without_rows() -> None:
    assert fold(torch.empty(0, 4), torch.empty(0, 2), torch.randn(2, 4), 1.0).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bits_are_the_same_on_any_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    each = [operands(dtype, torch.float32, seed=i) for i in range(6)]
    results = [torch.empty_like(weight) for weight, *_ in each]
    each_on_one_thread(lambda i: fold(*each[i], 0.5, out=results[i]), range(6))
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    rows = fold_rows(COLUMNS)
    for (weight, left, right), result in zip(each, results, strict=True):
        for part in (slice(0, rows), slice(rows, None)):  # as one who holds no more at a time
            block = torch.addmm(weight[part].float(), left[part], right, alpha=0.5)
            assert torch.equal(result[part], block.to(dtype))


def test_every_call_has_one_thread_and_the_callers_mode(threads: int) -> None:
    seen: list[tuple[int, bool]] = []

    def look(_: int) -> None:
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))

    each_on_one_thread(look, range(20))
    with torch.inference_mode():
        each_on_one_thread(look, range(20))
    each_on_one_thread(look, range(2), at_once=False)
    assert seen == [(1, False)] * 20 + [(1, True)] * 20 + [(1, False)] * 2
    assert torch.get_num_threads() == threads


def test_a_failure_reaches_the_caller(threads: int) -> None:
    def fail(i: int) -> None:
        if i == 7:
            raise ZeroDivisionError(i)

    with pytest.raises(ZeroDivisionError, match="7"):
        each_on_one_thread(fail, range(20))
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as other:  # threads that start later have what the caller chose
        assert other.submit(torch.get_num_threads).result() == threads
