"""Presets: the facts about a public data set, under a short name.

A preset fills in what a recipe leaves at its default: the task, where the rows are, their columns and labels,
the metric that decides. Rows of one's own in the same columns take all of it but the place:
``--data.preset glue/rte --data.train my_pairs.csv``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorica.errors import ConfigError, listing, nearest
from lorica.train.recipe import Recipe
from lorica.train.settings import DataConfig, GenerationConfig, TrainingConfig

if TYPE_CHECKING:
    from datasets import Dataset

_SOURCE = ("train", "validation", "test", "subset")


Part = DataConfig | TrainingConfig | GenerationConfig

Row = Mapping[str, Any]
"""A row: column → value."""


@dataclass(frozen=True)
class Preset:
    """A data set that is known by name.

    Args:
        about: a line about it.
        task: the task that is learned from it.
        data: fields of `DataConfig`: where the rows are, their columns, the labels in the order of their ids.
        training: fields of `TrainingConfig`, such as ``metric_for_best``.
        generation: fields of `GenerationConfig`.
        row: makes of a row, as any copy of the set has it, one with the columns that `data` names. None takes
            rows as they are.
    """

    about: str
    task: str
    data: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    row: Callable[[Row], Row] | None = None


_PRESETS: dict[str, Preset] = {}


def register(name: str, preset: Preset) -> Preset:
    """Make a preset known by a name.

    Raises:
        ConfigError: another has that name, or it names a field that does not exist.
    """
    parts = (
        (DataConfig, preset.data),
        (TrainingConfig, preset.training),
        (GenerationConfig, preset.generation),
    )
    for part, values in parts:
        known = [item.name for item in dataclasses.fields(part)]
        for key in values:
            if key not in known:
                raise ConfigError(f"the preset {name!r} has an unknown field {key!r}{nearest(key, known)}")
    if _PRESETS.setdefault(name, preset) is not preset:
        raise ConfigError(f"there is a preset {name!r} already")
    return preset


def get(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: it does not exist.
    """
    if name not in _PRESETS:
        raise ConfigError(
            f"there is no preset {name!r}{nearest(name, _PRESETS)}; the presets are: {', '.join(_PRESETS)}"
        )
    return _PRESETS[name]


def names() -> list[str]:
    """Names of all presets."""
    return list(_PRESETS)


def apply(recipe: Recipe, *, own_rows: bool = False) -> Recipe:
    """A recipe with its preset's values in place of defaults.

    Args:
        recipe: the recipe; one without a preset comes back as it is.
        own_rows: whether the rows come from elsewhere, so that the preset's places do not count.

    Raises:
        ConfigError: there is no such preset, or the recipe's task is another than its own.
    """
    name = recipe.data.preset
    if name is None:
        return recipe
    preset = get(name)
    if recipe.task not in (Recipe().task, preset.task):
        raise ConfigError(f"the preset {name!r} is for {preset.task}, not for {recipe.task}")
    own_rows = own_rows or recipe.data.train != DataConfig().train
    data = {key: value for key, value in preset.data.items() if not (own_rows and key in _SOURCE)}
    return recipe.replace(
        task=preset.task,
        data=_left_out(recipe.data, data),
        training=_left_out(recipe.training, preset.training),
        generation=_left_out(recipe.generation, preset.generation),
    )


def lay_out(rows: Dataset, name: str | None) -> Dataset:
    """The rows as a preset's task reads them.

    Args:
        rows: the rows, as they came.
        name: the preset, or None for rows as they are.

    Raises:
        ConfigError: there is no such preset, or the rows lack a column that it reads.
        RowError: rows have another form.
    """
    row = None if name is None else get(name).row
    if row is None:
        return rows
    from datasets import Dataset  # here: a name needs no rows

    from lorica.train.data.rows import Unusable, read_each

    def read(value: Row) -> Row:
        try:
            return row(value)
        except KeyError as missing:
            raise ConfigError(
                f"the preset {name!r} finds no column {missing} in rows of {listing(rows.column_names)}"
            ) from missing
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise Unusable(f"is no row of {name!r}: {error}") from error

    return Dataset.from_list([dict(each) for each in read_each(rows, read, "the rows")])


def _left_out(
    part: DataConfig | TrainingConfig | GenerationConfig, values: Mapping[str, Any]
) -> dict[str, Any]:
    default = type(part)()
    return {key: value for key, value in values.items() if getattr(part, key) == getattr(default, key)}
