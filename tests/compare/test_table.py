from __future__ import annotations

import pytest

from lorica.compare.table import Cost, Score, Table


@pytest.mark.parametrize(
    ("metric", "shown"), [("bleu", "33.0 ± 1.4"), ("nist", "0.33 ± 0.01"), ("cider", "0.33 ± 0.01")]
)
def test_a_score_below_one_is_a_share_only_where_one_is_its_end(metric: str, shown: str) -> None:
    score = Score(
        task="E2E",
        size=None,
        metric=metric,
        method="LoRA",
        learning_rate=1e-3,
        values=[0.32, 0.34],
        centre=0.33,
        deviation=0.0141,
        missing=0,
    )
    assert str(score) == shown


@pytest.mark.parametrize(
    ("metrics", "average"),
    [(("accuracy", "pearson"), "30.0"), (("mse", "mse"), None), (("bleu", "nist"), None)],
)
def test_only_shares_are_averaged(metrics: tuple[str, str], average: str | None) -> None:
    scores = [
        Score(task, None, metric, "LoRA", 1e-3, [value], value, None, 0)
        for task, metric, value in zip(("a", "b"), metrics, (0.2, 0.4), strict=True)
    ]
    cost = Cost("LoRA", "reparametrisation", None, 1, 4, 0.1, None)
    head, (row,) = Table(scores, [cost], "mean", "test", []).rows()
    assert ("average" in head) is (average is not None)
    assert average is None or row[head.index("average")] == average
