"""Work shared among threads: the same bits, and torch's own number of threads as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorica import threads
from lorica.functional import fold, fold_rows


@pytest.fixture(autouse=True)
def number() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "r"), [(64, 48, 64), (33, 129, 64), (1000, 2000, 2), (4100, 700, 17)]
)
def test_a_fold_has_the_same_bits_on_any_number_of_threads(
    rows: int, columns: int, r: int, transposed: bool
) -> None:
    weight = torch.randn(rows, columns)
    left, right = torch.randn(rows, r), torch.randn(r, columns)
    if transposed:
        left, right = left.t().contiguous().t(), right.t().contiguous().t()
    torch.set_num_threads(1)
    alone = fold(weight, left, right, 0.7)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(fold(weight, left, right, 0.7), alone)
        assert torch.get_num_threads() == count
    block = fold_rows(columns)
    parts = [fold(weight[i : i + block], left[i : i + block], right, 0.7) for i in range(0, rows, block)]
    assert torch.equal(torch.cat(parts), alone)
    torch.testing.assert_close(alone, weight + 0.7 * left @ right, rtol=1e-4, atol=1e-4)


def test_what_fails_on_a_thread_fails_here() -> None:
    def fail(part: range) -> None:
        assert torch.get_num_threads() == 1
        if 3 in part:
            raise ValueError("three")

    for count in (1, 2):
        torch.set_num_threads(count)
        with pytest.raises(ValueError, match="three"):
            threads.share(fail, range(5))
        assert torch.get_num_threads() == count
