"""The fields of a recipe to search, and their values."""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import UnionType
from typing import Any

from lorica.errors import ConfigError, FileError, LoricaError, lines, nearest
from lorica.reading import read_yaml
from lorica.train import presets
from lorica.train.recipe import Recipe, is_code
from lorica.tune.expression import Expression, field_named

KINDS = ("choice", "uniform", "loguniform", "integer", "tied", "value")
_FIXED = {
    "output": "is each trial's own folder",
    "training.metric_for_best": "decides between trials: give metric and mode to the search",
    "post.rewards": "may name code, which the recipe names",
    "training.load_best": "is on in a search: a trial is what its best checkpoint is",
}


@dataclass(frozen=True)
class Dimension:
    """One field's values.

    Args:
        kind: "choice" (one of a list), "uniform" or "loguniform" (a number between two), "integer" (a whole
            number between two, both included), "tied" (an expression over other fields) or "value" (always
            the same).
        given: the list, the two ends, the expression or the value.
    """

    kind: str
    given: Any

    def __post_init__(self) -> None:
        """Check the parts that can be checked without a recipe.

        Raises:
            ConfigError: an unknown kind, an empty choice, or unusable ends.
        """
        object.__setattr__(self, "given", _listed(self.given))  # as a resumed search finds it
        if self.kind not in KINDS:
            raise ConfigError(
                f"there is no {self.kind!r}{nearest(self.kind, KINDS)}; expected one of {KINDS}"
            )
        if self.kind == "choice" and not (isinstance(self.given, list) and self.given):
            raise ConfigError(f"choice needs a list of at least one value, not {self.given!r}")
        if self.kind in ("uniform", "loguniform", "integer"):
            self._check_ends()
        if self.kind == "tied":
            Expression(str(self.given))

    def _check_ends(self) -> None:
        number = int if self.kind == "integer" else (int, float)
        ends = self.given
        if not isinstance(ends, list) or len(ends) != 2:
            raise ConfigError(f"{self.kind} needs its two ends, [lowest, highest], not {ends!r}")
        if not all(isinstance(end, number) and not isinstance(end, bool) for end in ends):
            hint = "; YAML reads 1e-5 as text: write 1.0e-5" if any(isinstance(e, str) for e in ends) else ""
            raise ConfigError(f"the ends of {self.kind} must be numbers, not {ends!r}{hint}")
        if not ends[0] < ends[1] or not all(map(math.isfinite, ends)):
            raise ConfigError(f"{self.kind} needs its lowest end first, and they differ: not {ends!r}")
        if self.kind == "loguniform" and ends[0] <= 0:
            raise ConfigError(f"loguniform needs ends above 0, not {ends!r}")

    def draw(self, random: Random) -> Any:
        """A value at random."""
        if self.kind == "choice":
            return random.choice(self.given)
        if self.kind == "integer":
            return random.randint(*self.given)
        if self.kind == "loguniform":
            low, high = self.given
            return min(max(math.exp(random.uniform(math.log(low), math.log(high))), low), high)
        return random.uniform(*self.given) if self.kind == "uniform" else self.given

    def samples(self) -> list[Any]:
        """Values to check for the whole dimension: each of a choice, or both ends of a range."""
        return self.given if self.kind in ("choice", "uniform", "loguniform", "integer") else [self.given]


class Space:
    """A space of recipes: fields, by their names in a recipe, and their values.

    Args:
        fields: ``{"method.r": {"choice": [4, 8]}, "method.lora_alpha": {"tied": "2*r"}, ...}``; nested as in
            a recipe's YAML if that is easier to read. A field with a plain value is set to it.

    Raises:
        ConfigError: lists every problem: an unknown field, an empty choice, ends in the wrong order.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Read and check the fields; `check` adds the checks that need a recipe."""
        known, problems = fields_of(Recipe()), []
        self.dimensions: dict[str, Dimension] = {}
        for name, given in _unnested(fields, known):
            try:
                full = field_named(name, known, "the space")
                if full in _FIXED:
                    raise ConfigError(f"{full} cannot be in a space; it {_FIXED[full]}")
                if full in self.dimensions:
                    raise ConfigError(f"{full} is in the space twice")
                self.dimensions[full] = _dimension(given)
            except ConfigError as error:
                problems.append(f"{name}: {error}")
        task = self.dimensions.get("task")
        if task is not None and any(map(is_code, _flattened(task.given))):
            problems.append("task: code of your own is named by the recipe, not by a space")
        if not problems and not self.searched:
            problems.append("nothing to search: give a field a choice, uniform, loguniform or integer")
        if problems:
            raise ConfigError(f"the space cannot be searched:\n{lines(problems)}")

    @classmethod
    def load(cls, path: str | Path) -> Space:
        """Read a YAML file.

        Raises:
            FileError: there is no such file, or it is not YAML.
            ConfigError: as for `Space`.
        """
        path = Path(path)
        content = read_yaml(path, "the space")
        if not isinstance(content, Mapping):
            raise FileError(f"the space {path} must hold fields such as 'method.r: {{choice: [4, 8]}}'")
        return cls(content)

    @property
    def searched(self) -> dict[str, Dimension]:
        """The fields that vary by themselves."""
        return {name: d for name, d in self.dimensions.items() if d.kind not in ("tied", "value")}

    def recipe(self, base: Recipe, values: Mapping[str, Any]) -> Recipe:
        """A recipe with values for the searched fields, the tied ones computed.

        Raises:
            LoricaError: no recipe can have these values.
        """
        values = {**{n: d.given for n, d in self.dimensions.items() if d.kind == "value"}, **values}
        fields = {**fields_of(base), **values}
        tied = {n: Expression(str(d.given)) for n, d in self.dimensions.items() if d.kind == "tied"}
        while tied:
            ready = [
                n for n, e in tied.items() if not any(field_named(x, fields, n) in tied for x in e.names)
            ]
            if not ready:
                raise ConfigError(f"tied to each other in a circle: {', '.join(tied)}")
            for name in ready:
                fields[name] = values[name] = _as_typed(name, tied.pop(name).value(fields))
        changes: dict[str, Any] = {}
        for name, value in values.items():
            part, _, leaf = name.rpartition(".")
            if part:
                changes.setdefault(part, {})[leaf] = value
            else:
                changes[name] = value
        return base.replace(**changes)

    def check(self, base: Recipe) -> None:
        """Check that every part of the space makes valid recipes, before anything is trained.

        Each value of a choice and both ends of each range are put into the recipe, one field at a time.

        Raises:
            ConfigError: lists all values that are refused, and why.
        """
        first = {name: dimension.samples()[0] for name, dimension in self.searched.items()}
        problems = []
        for name, dimension in self.dimensions.items():
            if dimension.kind == "value":
                try:
                    _check_type(name, dimension, dimension.given)
                except ConfigError as error:
                    problems.append(f"{name} = {dimension.given!r}: {error}")
        # One that is wrong in all recipes would be found again with every other.
        for name, dimension in self.searched.items() if not problems else ():
            for value in dimension.samples():
                try:
                    _check_type(name, dimension, value)
                    _check_kept(name, value, self.recipe(base, {**first, name: value}))
                except (LoricaError, TypeError, ValueError) as error:
                    problems.append(f"{name} = {value!r}: {error}")
        if problems:
            raise ConfigError(f"the space holds what no recipe can be:\n{lines(dict.fromkeys(problems))}")

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the choices.

        Raises:
            ConfigError: the space has a range, which has no list of values.
        """
        ranges = [name for name, d in self.searched.items() if d.kind in ("uniform", "loguniform")]
        if ranges:
            raise ConfigError(f"a grid needs choices, and {', '.join(ranges)} is a range; list values to try")
        values = [
            d.given if d.kind == "choice" else list(range(d.given[0], d.given[1] + 1))
            for d in self.searched.values()
        ]
        for combination in itertools.product(*values):
            yield dict(zip(self.searched, combination, strict=True))

    def draw(self, random: Random) -> dict[str, Any]:
        """Random values for the searched fields."""
        return {name: dimension.draw(random) for name, dimension in self.searched.items()}


def documents(query: str = "query", value: str = "value") -> Space:
    """Learning rate, rank, targets and dropout as LoRA's tutorials search them, ``lora_alpha`` equal to r."""
    return Space(
        {
            "training.learning_rate": {"loguniform": [1e-4, 1e-1]},
            "method.r": {"choice": [2, 4, 6, 8, 10, 16]},
            "method.lora_alpha": {"tied": "r"},
            "method.target_modules": {"choice": [[query], [value], [query, value]]},
            "method.lora_dropout": {"uniform": [0.1, 0.5]},
        }
    )


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe's fields by their dotted names."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {
                f"{item.name}.{leaf.name}": getattr(value, leaf.name) for leaf in dataclasses.fields(value)
            }
        else:
            found[item.name] = value
    return found


def _unnested(fields: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    parts = {name.partition(".")[0] for name in known if "." in name}
    for name, given in fields.items():
        if name in parts and isinstance(given, Mapping):
            yield from ((f"{name}.{leaf}", inner) for leaf, inner in given.items())
        else:
            yield str(name), given


def _listed(value: Any) -> Any:
    """The value with lists in place of tuples, at every depth."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flattened(value: Any) -> list[Any]:
    return [part for item in value for part in _flattened(item)] if isinstance(value, list) else [value]


def _dimension(given: Any) -> Dimension:
    if not isinstance(given, Mapping):
        return Dimension("value", given)
    if len(given) != 1:
        raise ConfigError(f"expected one of {KINDS} with its values, not {dict(given)!r}")
    return Dimension(*next(iter(given.items())))


def _types(name: str) -> tuple[type, ...]:
    """The plain types that a field accepts; empty if it accepts others as well."""
    part, _, leaf = name.rpartition(".")
    owner = type(getattr(Recipe(), part)) if part else Recipe
    hint = typing.get_type_hints(owner)[leaf]
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    options = typing.get_args(hint) if union else (hint,)
    plain = all(isinstance(option, type) and typing.get_origin(option) is None for option in options)
    return options if plain else ()


def _check_type(name: str, dimension: Dimension, value: Any) -> None:
    types = _types(name)
    if int in types and float not in types and dimension.kind in ("uniform", "loguniform"):
        raise ConfigError(f"it is a whole number: search it by choice or integer, not {dimension.kind}")
    wide = (*types, int) if float in types else types
    boolean = isinstance(value, bool) and bool not in types
    if types and (boolean or not isinstance(value, wide)):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        hint = "; YAML reads 1e-5 as text: write 1.0e-5" if isinstance(value, str) and float in types else ""
        raise ConfigError(f"expected {wanted}{hint}")


def _check_kept(name: str, value: Any, made: Recipe) -> None:
    """Refuse a field's default where the recipe's preset fills in another value."""
    filled = fields_of(presets.apply(made))[name]
    if filled != value:
        raise ConfigError(f"left at its default, it becomes {filled!r} by the preset {made.data.preset!r}")


def _as_typed(name: str, value: Any) -> Any:
    """A computed number in its field's type: ``r / 2`` becomes a whole number for a whole-number field."""
    whole = int in _types(name) and float not in _types(name)
    if whole and isinstance(value, float):
        if not value.is_integer():
            raise ConfigError(f"{name} is a whole number, and its expression comes to {value}")
        return int(value)
    return value
