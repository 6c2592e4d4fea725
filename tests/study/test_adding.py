from __future__ import annotations

import pytest
from study import made

from lorica import study
from lorica.errors import AdapterError, ConfigError


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_by_the_products(scale: float) -> None:
    f, g = made.gaussian(20, 30, 3, 1), made.gaussian(20, 30, 5, 2, scale)
    found = study.interference({"a": made.adapter({"q": f}), "b": made.adapter({"q": g})})
    P, Q = made.dense(f), made.dense(g)
    layer = found.pairs["a + b"]["q"]
    assert layer.cosine == pytest.approx(float((P * Q).sum() / (P.norm() * Q.norm())))
    reads = [(X.mT @ X) for X in (P, Q)]
    expected = float((reads[0] * reads[1]).sum() / (reads[0].norm() * reads[1].norm()))
    assert layer.reads == pytest.approx(expected)


def test_planted() -> None:
    """The same inputs, other outputs: nothing is undone, but both hear the same."""
    U, V = made.columns(40, 4, 0), made.columns(50, 2, 1)
    one, two = made.planted(U[:, :2], [2, 1], V), made.planted(U[:, 2:], [2, 1], V)
    against = made.planted(-U[:, :2], [2, 1], V)
    report = study.interference(
        {n: made.adapter({"q": f}) for n, f in (("a", one), ("b", two), ("c", against))}
    )
    found = report.pairs
    assert (
        found["a + b"]["q"].cosine,
        found["a + b"]["q"].reads,
        found["a + b"]["q"].writes,
    ) == pytest.approx((0, 1, 0), abs=1e-9)
    assert found["a + c"]["q"].cosine == pytest.approx(-1)
    assert report.mean("a + c").writes == pytest.approx(1)


def test_what_cannot_be_compared() -> None:
    one = made.adapter({"q": made.gaussian(6, 5, 2), "v": made.gaussian(6, 5, 2)})
    two = made.adapter({"q": made.gaussian(6, 5, 3), "v": made.gaussian(6, 7, 2)})
    alone = made.adapter({"k": made.gaussian(6, 5, 2)})
    report = study.interference({"one": one, "two": two, "alone": alone})
    assert {pair: list(layers) for pair, layers in report.pairs.items()} == {"one + two": ["q"]}
    assert any("v: one update is (6, 5), the other (6, 7)" in note for note in report.notes)
    assert any("one + alone: no module is adapted by both" in note for note in report.notes)
    with pytest.raises(AdapterError, match="there is nothing to compare"):
        study.interference({"one": one, "alone": alone})
    with pytest.raises(ConfigError, match="two adapters or more, and got 1"):
        study.interference({"one": one})
