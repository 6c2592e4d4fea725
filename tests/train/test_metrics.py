from __future__ import annotations

import pytest

from lorica.train import metrics


def test_scores_by_hand() -> None:
    # Class 0: 2 true, 1 found of 1 predicted. Class 1: 2 true, 2 found of 3 predicted.
    scores = metrics.classification([0, 1, 1, 1], [0, 0, 1, 1])
    assert scores == pytest.approx(
        {
            "accuracy": 3 / 4,
            "f1": (2 * 2 / 3 + 2 * 4 / 5) / 4,
            "f1_macro": (2 / 3 + 4 / 5) / 2,
            "precision": (2 * 1 + 2 * 2 / 3) / 4,
            "recall": 3 / 4,
        }
    )


def test_the_whole_set_is_scored_not_the_mean_of_batches() -> None:
    predictions, labels = [0, 0, 0, 1], [0, 0, 1, 1]
    halves = [metrics.classification(predictions[i : i + 2], labels[i : i + 2])["f1"] for i in (0, 2)]
    assert metrics.classification(predictions, labels)["f1"] != pytest.approx(sum(halves) / 2)


def test_a_class_that_is_never_predicted_scores_zero() -> None:
    assert metrics.classification([0, 0], [0, 1])["f1_macro"] == pytest.approx(1 / 3)
