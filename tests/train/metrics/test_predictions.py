from __future__ import annotations

import numpy as np
import pytest

from lorica.train import metrics


def test_classes_by_hand() -> None:
    # Class 0: 2 true, 1 found of 1 predicted. Class 1: 2 true, 2 found of 3 predicted.
    scores = metrics.classification(
        [0, 1, 1, 1], [0, 0, 1, 1], [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.5, 0.5]]
    )
    assert scores == pytest.approx(
        {
            "accuracy": 3 / 4,
            "f1": (2 * 2 / 3 + 2 * 4 / 5) / 4,
            "f1_macro": (2 / 3 + 4 / 5) / 2,
            "f1_binary": 4 / 5,
            "precision": (2 * 1 + 2 * 2 / 3) / 4,
            "recall": 3 / 4,
            # (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) of TP 2, TN 1, FP 1, FN 0
            "matthews": 2 / np.sqrt(3 * 2 * 2 * 1),
            # Pairs in the right order: (.7, .1), (.7, .6), (.5, .1), not (.5, .6)
            "roc_auc": 3 / 4,
        }
    )


def test_the_area_of_several_classes_is_the_mean_over_those_with_both_kinds_of_rows() -> None:
    odds = [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1]]
    # Class 0: rows 1 and 3 before row 2. Class 1: row 2 before both. Class 2 never occurs.
    assert metrics.classification([0, 1, 0], [0, 1, 0], odds)["roc_auc"] == 1.0
    assert "roc_auc" not in metrics.classification([0, 0], [0, 0], [[0.9, 0.1], [0.8, 0.2]])


def test_the_whole_set_is_scored_not_the_mean_of_batches() -> None:
    predictions, labels = [0, 0, 0, 1], [0, 0, 1, 1]
    halves = [metrics.classification(predictions[i : i + 2], labels[i : i + 2])["f1"] for i in (0, 2)]
    assert metrics.classification(predictions, labels)["f1"] != pytest.approx(sum(halves) / 2)


def test_a_class_that_is_never_predicted_scores_zero() -> None:
    assert metrics.classification([0, 0], [0, 1])["f1_macro"] == pytest.approx(1 / 3)
    assert metrics.classification([0, 0], [0, 0])["matthews"] == 0


def test_several_labels_a_row_by_hand() -> None:
    scores = metrics.multi_label([[0.9, 0.2, 0.6], [0.7, 0.8, 0.1]], [[1, 0, 0], [1, 1, 0]])
    # Three right of four said, of three true; class 0 and 1 perfect, class 2 said once and never true.
    assert scores == pytest.approx(
        {
            "accuracy": 1 / 2,
            "f1_micro": 6 / 7,
            "f1_macro": 2 / 3,
            "precision": 3 / 4,
            "recall": 1.0,
            "roc_auc": 1.0,  # class 1 alone has rows of both kinds
        }
    )


def test_numbers_by_hand() -> None:
    said, true = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
    scores = metrics.regression(said, true)
    assert scores == pytest.approx(
        {"pearson": np.corrcoef(said, true)[0, 1], "spearman": 0.5, "mse": 5 / 3, "mae": 1.0}
    )
    assert metrics.regression([1, 1], [1, 2])["pearson"] == 0
    assert metrics.regression([1], [1])["spearman"] == 0
