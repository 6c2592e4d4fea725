from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from train import tiny
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments

from lorica.train import Trainer
from lorica.train.trainer.scoring import back_in_order

ROWS = 23


@pytest.fixture
def rows() -> Dataset:
    """Rows of unlike lengths, their own number as the label of each."""
    texts = [" ".join(["film"] * (1 + 7 * row % 20)) for row in range(ROWS)]
    encoded: dict[str, Any] = dict(tiny.tokenizer()(texts))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return Dataset.from_dict({**encoded, "labels": [row % 2 for row in range(ROWS)], "length": lengths})


def make_trainer(tmp_path: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny.write_model(tmp_path / "model"))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=4,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
    )
    collator = DataCollatorWithPadding(tiny.tokenizer())
    return Trainer(model=model, args=args, data_collator=collator, **options)


def alone(trainer: Trainer, rows: Dataset) -> np.ndarray:
    """Logits of each row in a batch of its own."""
    model = trainer.model
    assert model is not None
    with torch.no_grad():
        found = [model.eval()(torch.tensor([ids])).logits for ids in rows["input_ids"]]
    return torch.cat(found).numpy()


def test_the_longest_rows_are_read_first_and_outputs_stand_beside_their_rows(
    tmp_path: Path, rows: Dataset
) -> None:
    given: list[tuple[Any, Any]] = []

    def score(outcome: Any, features: Dataset) -> dict[str, float]:
        given.append((outcome, features))
        return {}

    trainer = make_trainer(tmp_path, score=score)
    widths: list[int] = []
    assert trainer.model is not None
    hook = trainer.model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    found = trainer.predict(rows)
    hook.remove()
    longest = sorted(rows["length"], reverse=True)
    assert widths == longest[::4], "a batch is as wide as its first row"
    expected = alone(trainer, rows)
    np.testing.assert_allclose(found.predictions, expected, atol=1e-6)
    np.testing.assert_array_equal(found.label_ids, rows["labels"])
    outcome, features = given[0]
    np.testing.assert_allclose(outcome.predictions, expected, atol=1e-6)
    np.testing.assert_array_equal(outcome.label_ids, features["labels"])
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(torch.tensor(expected), torch.tensor(rows["labels"])).item(),
        abs=1e-6,
    )


def test_rows_without_lengths_are_read_as_they_come(tmp_path: Path, rows: Dataset) -> None:
    trainer = make_trainer(tmp_path)
    found = trainer.predict(rows.remove_columns("length"))
    np.testing.assert_allclose(found.predictions, alone(trainer, rows), atol=1e-6)


def test_whatever_was_read_comes_back_in_order() -> None:
    order, array = [2, 0, 1], np.array([[2.0], [0.0], [1.0]])
    back = np.array([[0.0], [1.0], [2.0]])
    np.testing.assert_array_equal(back_in_order(array, order), back)
    nested = back_in_order((array, [array, None], {"x": array}), order)
    np.testing.assert_array_equal(nested[0], back)
    np.testing.assert_array_equal(nested[1][0], back)
    assert nested[1][1] is None
    np.testing.assert_array_equal(nested[2]["x"], back)
    assert back_in_order(array, None) is array


def test_a_model_that_has_diverged_has_no_scores(tmp_path: Path, rows: Dataset) -> None:
    """Whatever class its NaNs stand for, some of the rows are of it."""

    def score(outcome: Any, features: Dataset) -> dict[str, float]:
        assert np.isfinite(outcome.predictions).all()
        return {"accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())}

    trainer = make_trainer(tmp_path, score=score)
    assert 0 < trainer.evaluate(rows)["eval_accuracy"] < 1
    model: Any = trainer.model
    with torch.no_grad():
        model.classifier.weight.fill_(torch.nan)
    assert np.isnan(trainer.evaluate(rows)["eval_accuracy"])
