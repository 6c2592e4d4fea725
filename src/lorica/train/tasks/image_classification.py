"""Image classification: a class for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, Image, Value
from torch import Tensor
from transformers.trainer_utils import EvalPrediction

from lorica.errors import ConfigError
from lorica.train import metrics
from lorica.train.data.columns import find_column, find_label, label_ids, needs_column
from lorica.train.data.labels import notes_on_labels
from lorica.train.data.rows import Unusable, read_each
from lorica.train.data.splits import Splits
from lorica.train.embedded import resolve_model
from lorica.train.settings import DataConfig
from lorica.train.tasks.base import Encoded, Task, loading
from lorica.train.tasks.texts import classes, logits_of, most_likely, named_outputs, softmax

_IMAGES = ("image", "img", "picture", "photo", "file_name", "path")

# The model's forward names it, so the trainer keeps it; the collator makes numbers of it, a batch at a time.
_COLUMN = "pixel_values"


class ImageClassification(Task):
    """One class for each image. Rows have an image, or the path of one (``data.text``), and a label."""

    name = "image-classification"
    task_type = None
    auto_class = "AutoModelForImageClassification"
    best_metric = "accuracy"
    modules_to_save = ("classifier",)
    reads_files = True

    def resolve(self, splits: Splits, data: DataConfig) -> DataConfig:
        """Find the image and label columns, and the classes' names."""
        if data.text_pair:
            raise ConfigError(f"{self.name} reads no pairs; leave out data.text_pair")
        rows = splits.train
        known = [name.lower() for name, feature in rows.features.items() if isinstance(feature, Image)]
        image = find_column(rows, data.text, [*known, *_IMAGES], "images", "text")
        label = find_label(rows, data.label)
        return replace(data, text=image, label=label, labels=classes(rows, label, data.labels))

    def located(self, rows: Dataset, data: DataConfig, folder: Path | None, where: str) -> Dataset:
        """Paths are relative to the file that has them, or else to the working directory."""
        name = data.text
        if folder is None or name not in rows.column_names or rows.features[name] != Value("string"):
            return rows

        def find(given: str | None) -> str | None:
            if given is None or "://" in given or Path(given).is_absolute():
                return given
            places = [folder / given, Path(given)]
            found = next((place for place in places if place.exists()), None)
            if found is None:
                raise Unusable(
                    f"names an image in column {name!r} ({given}) that is neither in {folder.absolute()}, "
                    f"where these rows are, nor in the working directory {Path.cwd()}"
                )
            return str(found)

        paths: Any = read_each(rows[name], find, where)
        located = rows.add_column(_COLUMN, paths)  # type: ignore[call-arg]
        return located.remove_columns(name).rename_column(_COLUMN, name)

    def encode(
        self,
        rows: Dataset,
        data: DataConfig,
        tokenizer: Any,
        max_length: int,
        where: str,
        *,
        labelled: bool = True,
    ) -> Encoded:
        """Look at every image once, so that one that cannot be read is found before training."""
        assert data.text is not None
        assert data.label is not None
        for name in (data.text, data.label) if labelled else (data.text,):
            needs_column(rows, name, where)
        features = rows.select_columns([data.text]).rename_column(data.text, _COLUMN)
        features = features.cast_column(_COLUMN, Image())

        paths = features.cast_column(_COLUMN, Image(decode=False))

        def look(row: int) -> None:
            try:
                image = features[row][_COLUMN]
                if image is None:
                    raise ValueError("there is none")
                image.load()
            except Exception as error:  # each format's decoder raises its own kinds
                path = (paths[row][_COLUMN] or {}).get("path")
                named = "" if path is None else f" ({path})"
                problem = f"has an image in column {data.text!r} that cannot be read{named}: {error}"
                raise Unusable(problem) from error

        read_each(range(len(features)), look, where)
        # All alike, so that grouping by length leaves them in a random order.
        features = features.add_column("length", [1] * len(features))  # type: ignore[call-arg]
        if labelled:
            features = features.add_column("labels", label_ids(rows, data.label, data.labels or [], where))  # type: ignore[call-arg]
        return Encoded(features, 0, 0)

    def notes(self, rows: Dataset, data: DataConfig) -> list[str]:
        """Labels that are not written as the classes they are taken for."""
        return notes_on_labels(rows[str(data.label)], data.labels or [], str(data.label))

    def head(self, data: DataConfig) -> dict[str, Any]:
        """As many outputs as classes, with their names."""
        return named_outputs(data.labels or [])

    def collator(self, tokenizer: Any) -> ImageCollator:
        """Resize and normalise the images of a batch as the model's own processor does, and stack them."""
        return ImageCollator(tokenizer)

    def metrics(self, outcome: EvalPrediction, features: Dataset) -> dict[str, float]:
        """Accuracy, F1, precision, recall and Matthews of the most likely classes; ROC-AUC of all."""
        logits = logits_of(outcome.predictions)
        return metrics.classification(logits.argmax(-1), outcome.label_ids, softmax(logits))

    def read(self, outputs: Any, features: Dataset, data: DataConfig) -> list[dict[str, Any]]:
        """The most likely class, its probability, and those of all classes."""
        return most_likely(outputs, data.labels or [])

    def rows(self, texts: Sequence[str], data: DataConfig) -> Dataset:
        """A row for each path of an image."""
        return Dataset.from_dict({data.text: list(texts)})

    def inputs(self, data: DataConfig) -> list[str]:
        """The image."""
        return [data.text] if data.text is not None else []

    def tokenizer(self, name: str) -> Any:
        """Load a model's image processor.

        Raises:
            FileError: it does not exist.
        """
        with loading(f"an image processor from {name!r}"):
            return transformers.AutoImageProcessor.from_pretrained(
                resolve_model(name), trust_remote_code=False
            )


class ImageCollator:
    """Makes a batch of images; see `ImageClassification.collator`."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: ``pixel_values`` (rows, channels, height, width), and ``labels`` (rows,)."""
        images = [row[_COLUMN].convert("RGB") for row in rows]
        batch = {_COLUMN: self.processor(images=images, return_tensors="pt")[_COLUMN]}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch
