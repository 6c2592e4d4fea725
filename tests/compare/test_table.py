from __future__ import annotations

import pytest

from lorica.compare.table import Score


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
