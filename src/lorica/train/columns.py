"""Which columns hold the texts and the labels, and which number stands for which label."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from datasets import ClassLabel, Dataset

from lorica.errors import ConfigError, listing, nearest
from lorica.train.rows import Unusable, read_each

# In order: a data set that has both a pair and a single name is a pair.
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
TEXTS = (
    "text",
    "sentence",
    "content",
    "review",
    "comment",
    "tweet",
    "body",
    "message",
    "document",
    "question",
    "title",
    "utterance",
)
LABELS = (
    "label",
    "labels",
    "target",
    "class",
    "category",
    "coarse_label",
    "intent",
    "emotion",
    "sentiment",
    "topic",
    "y",
)


def find_texts(rows: Dataset, text: str | None, text_pair: str | None) -> tuple[str, str | None]:
    """Find the text column, or the two of a pair.

    Args:
        rows: the rows.
        text: the column the user named, if any.
        text_pair: the second column the user named, if any.

    Returns:
        The column, and the second one or None.

    Raises:
        ConfigError: a named column does not exist, or no usual name is there and no single column holds text.
    """
    for name in (text, text_pair):
        _check_named(rows, name)
    if text is not None:
        return text, text_pair
    if text_pair is not None:
        raise ConfigError(f"data.text_pair is {text_pair!r}; name the first text too, with data.text")
    columns = {name.lower(): name for name in rows.column_names}
    for first, second in PAIRS:
        if first in columns and second in columns:
            return columns[first], columns[second]
    for name in TEXTS:
        if name in columns:
            return columns[name], None
    strings = [name for name in rows.column_names if _is_text(rows, name) and name.lower() not in LABELS]
    if len(strings) == 1:
        return strings[0], None
    raise ConfigError(
        "cannot tell which column holds the text; name it with --data.text. The columns are: "
        f"{listing(rows.column_names)}"
    )


def find_label(rows: Dataset, label: str | None, usual: Sequence[str] = LABELS, what: str = "label") -> str:
    """Find the label column; see `find_column`."""
    return find_column(rows, label, usual, what, "label")


def find_column(rows: Dataset, named: str | None, usual: Sequence[str], what: str, option: str) -> str:
    """Find a column.

    Args:
        rows: the rows.
        named: the column the user named, if any.
        usual: names to look for in lower case, the first found wins.
        what: what to call it in an error.
        option: field of `DataConfig` that names it.

    Raises:
        ConfigError: the named column does not exist, or no usual name is there.
    """
    _check_named(rows, named)
    if named is not None:
        return named
    columns = {name.lower(): name for name in rows.column_names}
    for name in usual:
        if name in columns:
            return columns[name]
    raise ConfigError(
        f"cannot tell which column holds the {what}; name it with --data.{option}. The columns are: "
        f"{listing(rows.column_names)}"
    )


def label_names(rows: Dataset, column: str, where: str = "the training rows") -> list[str]:
    """Names of the classes in the order of their ids.

    They are the data set's own if it has any, else the values, sorted; numbers by size.

    Raises:
        RowError: rows have no label, or one that is no class.
        ConfigError: the labels are all the same, or hardly two are.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(read_each(rows[column], partial(_value, column=column), where))
    if len(values) < 2:
        raise ConfigError(
            f"all labels in column {column!r} of {where} are {next(iter(values))!r}; classification needs "
            "at least two classes"
        )
    if len(values) > max(1000, len(rows) // 2):
        raise ConfigError(
            f"column {column!r} of {where} has {len(values)} different values in {len(rows)} rows; that is "
            "no set of classes"
        )
    return _sorted(values)


def label_ids(rows: Dataset, column: str, names: Sequence[str], where: str) -> list[int]:
    """Id of each row's label.

    A value is looked up among the names. Where none of them is a whole number, a whole number is an id; so is
    one of a data set's own classes, where as many others are named in their place.

    Raises:
        ConfigError: there is no such column.
        RowError: rows have no label, or one that is none of the names.
    """
    needs_column(rows, column, where)
    return read_each(rows[column], _finder(rows.features[column], names, column), where)


def label_list_names(rows: Dataset, column: str, where: str = "the training rows") -> list[str]:
    """Names of the classes of a column of lists; see `label_names`.

    Raises:
        RowError: rows have no list, or a list has a gap.
        ConfigError: no row has a label.
    """
    inner = _inner(rows, column)
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    found = read_each(
        rows[column], lambda items: {_value(item, column) for item in _items(items, column)}, where
    )
    values = set().union(*found)
    if not values:
        raise ConfigError(f"no row of {where} has a label in column {column!r}")
    return _sorted(values)


def label_list_ids(rows: Dataset, column: str, names: Sequence[str], where: str) -> list[list[int]]:
    """Ids of each row's labels, for a column of lists; see `label_ids`.

    Raises:
        ConfigError: there is no such column.
        RowError: rows have no list, a list has a gap, or a label is none of the names.
    """
    needs_column(rows, column, where)
    find = _finder(_inner(rows, column), names, column)
    return read_each(rows[column], lambda items: [find(item) for item in _items(items, column)], where)


def numbers(rows: Dataset, column: str, where: str) -> list[float]:
    """The numbers of a column.

    Raises:
        ConfigError: there is no such column.
        RowError: rows have none.
    """
    needs_column(rows, column, where)

    def read(value: Any) -> float:
        # A csv file's numbers come as texts if one of them is none.
        number = _float(value) if isinstance(value, (int, float, str)) else math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            got = "nothing" if value in (None, "") else f"{value!r:.60}"
            raise Unusable(f"has {got} in column {column!r}, where a number is due")
        return number

    return read_each(rows[column], read, where)


def check_texts(rows: Dataset, columns: Sequence[str], where: str) -> None:
    """Refuse rows whose text is missing or is no text.

    Raises:
        ConfigError: a column is missing.
        RowError: rows' text is null or not a string.
    """
    for column in columns:
        needs_column(rows, column, where)

        def read(value: Any, column: str = column) -> None:
            if not isinstance(value, str):
                got = "nothing" if value is None else f"{value!r:.60}"
                raise Unusable(f"has {got} in column {column!r}, where a text is due")

        read_each(rows[column], read, where)


def needs_column(rows: Dataset, column: str, where: str) -> None:
    """Refuse rows that lack a column.

    Raises:
        ConfigError: they do.
    """
    if column not in rows.column_names:
        raise ConfigError(
            f"there is no column {column!r} in {where}{nearest(column, rows.column_names)}; the columns are: "
            f"{listing(rows.column_names)}"
        )


def _float(value: float | str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def _check_named(rows: Dataset, name: str | None) -> None:
    if name is not None:
        needs_column(rows, name, "the training rows")


def _is_text(rows: Dataset, column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in ("string", "large_string")


def _inner(rows: Dataset, column: str) -> Any:
    feature = rows.features[column]
    return getattr(feature, "feature", feature)


def _sorted(values: set[int | str]) -> list[str]:
    numeric = all(isinstance(value, int) for value in values)
    return [str(value) for value in (sorted(values) if numeric else sorted(map(str, values)))]


def _items(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        got = "nothing" if value is None else f"{value!r:.60}"
        raise Unusable(f"has {got} in column {column!r}, where a list is due")
    return value


def _finder(feature: Any, names: Sequence[str], column: str) -> Callable[[Any], int]:
    # Where names are numbers, a number that is none of them is a class that the training rows lack.
    places = 0 if any(name.removeprefix("-").isdecimal() for name in names) else len(names)
    own = list(feature.names) if isinstance(feature, ClassLabel) else []
    if len(own) == len(names) and not set(own) & set(names):
        own = list(names)  # the classes were given other names
    ids = {name: i for i, name in enumerate(names)}
    return partial(_id, own=own, ids=ids, places=places, column=column)


def _id(raw: Any, own: list[str], ids: dict[str, int], places: int, column: str) -> int:
    if isinstance(raw, int) and 0 <= raw < len(own):
        raw = own[raw]
    value = _value(raw, column)
    if str(value) in ids:
        return ids[str(value)]
    if isinstance(value, int) and 0 <= value < places:
        return value
    hint = nearest(str(value), ids)
    raise Unusable(
        f"has the label {value!r} in column {column!r}, which the training rows do not "
        f"have{hint or '; they have ' + listing(ids)}"
    )


def _value(value: Any, column: str) -> int | str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise Unusable(f"has no label in column {column!r}")
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise Unusable(
                f"has the label {value} in column {column!r}; classes must be names or whole numbers. "
                "Numbers to predict are a task of their own: --task regression"
            )
        return int(value)
    if isinstance(value, (int, str)):
        return value
    raise Unusable(
        f"has a {type(value).__name__} in column {column!r} as its label; expected one name or whole number"
        + (". Several labels a row are --task multi-label-classification" if isinstance(value, list) else "")
    )
