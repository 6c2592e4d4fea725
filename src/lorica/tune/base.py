"""One base for many trials: its rows are read and encoded once, its weights loaded once."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, cast

from transformers import PreTrainedModel

from lorica.train import tasks
from lorica.train.preparing import Encoding, Prepared, encode, load_model
from lorica.train.recipe import Recipe
from lorica.train.tasks import Task
from lorica.tune.joining import base_of
from lorica.tune.shipping import Shipped
from lorica.tune.twin import places_of, share, twin


class SharedBase:
    """What trials on one base share: rows, and weights.

    Args:
        recipe: of one of the trials.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Load nothing yet."""
        self.key = base_of(recipe)
        self._rows: dict[int, Encoding] = {}
        self._models: dict[int, PreTrainedModel] = {}
        self.places: dict[str, int] = {}

    def prepared(self, recipe: Recipe) -> Prepared:
        """As `lorica.train.prepare`, around the shared weights."""
        length, seed = recipe.training.max_length, recipe.training.seed
        if length not in self._rows:
            self._rows[length] = encode(recipe)
        read = self._rows[length]
        if seed not in self._models:
            model = load_model(read.recipe.replace(training={"seed": seed}), read)
            if self._models:  # only what is new hangs on the seed
                share(model, next(iter(self._models.values())))
            self._models[seed] = model
            self.places = places_of(model)
        recipe, model = dataclasses.replace(recipe, data=read.recipe.data), twin(self._models[seed])
        return Prepared(recipe, read.task, read.tokenizer, model, read.splits, read.data)

    def shipped(self) -> tuple[Any, ...]:
        """What has been loaded, for `unpacked` in another process."""
        # A task in a file of the user's has no module that could be imported there.
        rows = {length: read._replace(task=cast(Task, None)) for length, read in self._rows.items()}
        return self.key, rows, {seed: Shipped.of(model) for seed, model in self._models.items()}

    @classmethod
    def unpacked(cls, shipped: tuple[Any, ...]) -> Self:
        """The base in this process, around the very bytes that came."""
        key, rows, models = shipped
        base = cls.__new__(cls)
        base.key = key
        base._rows = {
            length: read._replace(task=tasks.get(read.recipe.task)) for length, read in rows.items()
        }
        base._models = {seed: model.model() for seed, model in models.items()}
        base.places = {}
        return base
