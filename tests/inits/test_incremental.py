"""EVA's arithmetic: directions that come batch by batch, and ranks shared out by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica import inits


def inputs(rows: int, dim: int = 20, seed: int = 0) -> Tensor:
    """Rows with a mean, and variances that fall off."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(9))).Q
    return torch.randn(rows, dim, generator=draw) * 0.5 ** torch.arange(dim) @ basis + 3


def seen(batches: list[Tensor], k: int) -> inits.IncrementalSVD:
    svd = inits.IncrementalSVD(k, inits.generator(0, "a"))
    for x in batches:
        svd.add(x)
    return svd


@pytest.mark.parametrize("sizes", [[400], [100, 300], [37, 150, 60, 90, 63]])
def test_the_right_singular_vectors_of_all_inputs_less_their_mean(sizes: list[int]) -> None:
    x = inputs(400)
    svd = seen(list(x.split(sizes)), 4)
    assert svd.Vh is not None
    assert svd.S is not None
    assert svd.mean is not None
    centred = (x - x.mean(0)).double()
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(svd.mean, x.double().mean(0))
    torch.testing.assert_close(svd.S.double(), S[:4], rtol=2e-3, atol=0)
    assert (torch.cosine_similarity(svd.Vh.double(), Vh[:4]).abs() > 0.999).all()
    share = S[:4].square() / centred.square().sum()
    torch.testing.assert_close(svd.explained(), share, rtol=5e-3, atol=0)


def test_directions_settle_on_what_repeats() -> None:
    x = inputs(200)
    svd = seen([x], 3)
    assert not svd.settled.any()
    svd.add(x)
    assert (svd.settled > 0.999).all()


def test_signs_do_not_flip() -> None:
    one, other = (seen(list(inputs(300).split(100))[::step], 3).Vh for step in (1, -1))
    assert one is not None
    assert other is not None
    assert (torch.cosine_similarity(one, other) > 0.99).all()


def test_a_batch_of_too_few_rows_is_passed_over() -> None:
    svd = seen([inputs(3)], 4)
    assert svd.Vh is None
    assert svd.rows == 0


class TestRanks:
    def test_they_go_to_the_largest_shares(self) -> None:
        shares = {
            "a": torch.tensor([0.9, 0.05]),
            "b": torch.tensor([0.4, 0.3]),
            "c": torch.tensor([0.01, 0.0]),
        }
        assert inits.share_ranks(shares, 3, {}) == {"a": 1, "b": 2, "c": 0}

    def test_the_budget_is_kept(self) -> None:
        shares = {name: torch.rand(8) for name in "abcd"}
        ranks = inits.share_ranks(shares, 16, {})
        assert sum(ranks.values()) == 16
        assert max(ranks.values()) <= 8

    def test_of_layers_with_the_same_inputs_the_one_looked_at_gets_no_less(self) -> None:
        same = torch.tensor([0.5, 0.5])
        ranks = inits.share_ranks({"b": same, "a": same.clone()}, 3, {"b": "a"})
        assert ranks["a"] >= ranks["b"]
        assert sum(ranks.values()) == 3
