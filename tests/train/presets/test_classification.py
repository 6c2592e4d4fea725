from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from train import tiny

from lorica.errors import ConfigError
from lorica.train import DataConfig, Recipe, prepare, presets, train

# Columns, the Hub's own names of the classes, and the metric that decides.
SIMILAR = ["entailment", "not_entailment"]
MNLI = (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], "accuracy")
TASKS: dict[str, tuple[list[str], list[str] | None, str]] = {
    "cola": (["sentence"], ["unacceptable", "acceptable"], "matthews"),
    "sst2": (["sentence"], ["negative", "positive"], "accuracy"),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], "accuracy"),
    "stsb": (["sentence1", "sentence2"], None, "pearson"),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"], "accuracy"),
    "mnli": MNLI,
    "mnli_mismatched": MNLI,
    "qnli": (["question", "sentence"], SIMILAR, "accuracy"),
    "rte": (["sentence1", "sentence2"], SIMILAR, "accuracy"),
}


def glue(name: str, count: int, *, labelled: bool = True) -> Dataset:
    """Rows as the Hub has them."""
    columns, classes, _ = TASKS[name]
    texts = {column: [f"film song {i}" for i in range(count)] for column in columns}
    label: Any = Value("float32") if classes is None else ClassLabel(names=classes)
    labels = [i % len(classes or range(5)) if labelled else -1 for i in range(count)]
    return Dataset.from_dict(
        {**texts, "label": labels, "idx": list(range(count))},
        Features({**{column: Value("string") for column in columns}, "label": label, "idx": Value("int32")}),
    )


def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    asked: list[tuple[str, str | None]] = []

    def load_dataset(name: str, subset: str | None) -> DatasetDict:
        asked.append((name, subset))
        assert subset is not None
        splits: dict[Any, Dataset] = {"train": glue(subset, 12), "test": glue(subset, 4, labelled=False)}
        if subset == "mnli":
            splits |= {"validation_matched": glue(subset, 5), "validation_mismatched": glue(subset, 7)}
        else:
            splits["validation"] = glue(subset, 6)
        return DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", TASKS)
def test_glue_from_the_hub(name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch)
    found = prepare(Recipe(model=str(tiny_model), data=DataConfig(preset=f"glue/{name}")))
    columns, classes, metric = TASKS[name]
    assert set(asked) == {("nyu-mll/glue", name.partition("_")[0])}
    assert found.task.inputs(found.recipe.data) == columns
    assert found.recipe.task == ("regression" if classes is None else "sequence-classification")
    assert found.recipe.data.labels == classes
    assert found.model.config.num_labels == len(classes or [None])
    assert found.recipe.training.metric_for_best == metric
    rows = {"mnli": 5, "mnli_mismatched": 7}.get(name, 6)
    assert {split: len(each) for split, each in found.splits.items()} == {"train": 12, "validation": rows}


def test_film_reviews_from_the_hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": ["film", "song"] * 3, "label": [0, 1] * 3}, features)
    of: Any = {"train": rows, "validation": rows, "test": rows}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: DatasetDict(of))
    found = prepare(Recipe(model=str(tiny_model), data=DataConfig(preset="rotten_tomatoes")))
    assert found.recipe.data.labels == ["negative", "positive"]
    assert found.splits["test"].features["labels"] == [0, 1] * 3


def test_rows_of_ones_own_in_the_same_columns(
    tiny_model: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    path = tiny.write_rows(
        tmp_path / "pairs.jsonl",
        [{"sentence1": "film", "sentence2": "song", "label": i % 2, "note": "x"} for i in range(12)],
    )
    recipe = make_recipe(max_steps=1).replace(data={"preset": "glue/rte", "train": str(path)})
    result = train(recipe)  # without a Hub to ask
    saved = Recipe.load(result.output / "recipe.yaml")
    assert saved.data.labels == ["entailment", "not_entailment"]
    assert saved.data.text_pair == "sentence2"
    assert presets.apply(saved) == saved
    assert "f1_binary" in result.metrics["validation"]


def test_what_the_user_says_wins() -> None:
    data = DataConfig(preset="glue/cola", text="body", labels=["no", "yes"])
    found = presets.apply(Recipe(data=data).replace(training={"metric_for_best": "accuracy"}))
    assert (found.data.text, found.data.labels) == ("body", ["no", "yes"])
    assert found.training.metric_for_best == "accuracy"
    assert found.data.train == "nyu-mll/glue"


def test_wrong_presets() -> None:
    with pytest.raises(ConfigError, match="no preset 'glue/rta'; did you mean 'glue/rte'"):
        presets.apply(Recipe(data=DataConfig(preset="glue/rta")))
    with pytest.raises(ConfigError, match="is for sequence-classification, not for regression"):
        presets.apply(Recipe(task="regression", data=DataConfig(preset="glue/rte")))
    with pytest.raises(ConfigError, match="there is a preset 'glue/rte' already"):
        presets.register("glue/rte", presets.Preset("x", "regression", {}))
    with pytest.raises(ConfigError, match="unknown field 'txt'; did you mean 'text'"):
        presets.register("own", presets.Preset("x", "regression", {"txt": "a"}))


def test_shared_data_by_preset(tiny_model: Path, data_dir: Path) -> None:
    for name, folder in {
        "glue/rte": "rte",
        "glue/stsb": "stsb",
        "rotten_tomatoes": "rotten_tomatoes",
    }.items():
        data = DataConfig(preset=name, train=str(data_dir / folder), train_rows=64)
        found = prepare(Recipe(model=str(tiny_model), data=data))
        assert len(found.splits["train"]) == 64
        assert len(found.splits["validation"]) > 64
