"""Does what a file holds fit the fields of a configuration?"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, TypeVar

from lorica.errors import ConfigError, listing, nearest

C = TypeVar("C")


def check_fields(values: Mapping[str, Any], default: Any, where: str) -> None:
    """Refuse plain values of which one belongs to no field.

    Args:
        values: fields by name, those of a part in a mapping of their own.
        default: what they are to become, such as a `Recipe`, with all its defaults.
        where: what to call them in an error.

    Raises:
        ConfigError: naming every unknown field, with the nearest known one; a part that holds no fields; or
            every field that is null and must not be.
    """
    if unknown := list(_unknown(values, default)):
        raise ConfigError(f"{where}: unknown field {'; unknown field '.join(unknown)}")
    for name, value in values.items():
        if dataclasses.is_dataclass(getattr(default, name)) and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {name} must hold fields, not {value!r}")
    if empty := list(_empty(values, default)):
        raise ConfigError(
            f"{where}: {listing(empty)} must have a value, not null; leave it out for the default"
        )


def read_fields(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """A configuration of plain fields, from what a file holds.

    Args:
        cls: a dataclass whose fields are numbers, texts, truth values or maps of numbers.
        values: fields by name.
        where: what to call the file in an error.

    Raises:
        ConfigError: a field that does not exist, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    if unknown := [f"{str(name)!r}{nearest(str(name), names)}" for name in values if name not in names]:
        raise ConfigError(f"{where}: unknown field {'; unknown field '.join(unknown)}")
    if wrong := [
        f"{name} cannot be {value!r}" for name, value in values.items() if not _fits(value, hints[name])
    ]:
        raise ConfigError(f"{where}: {listing(wrong)}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(
            _fits(item, typing.get_args(hint)[1]) for item in value.values()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _unknown(content: Mapping[str, Any], known: Any, prefix: str = "") -> Iterator[str]:
    names = [item.name for item in dataclasses.fields(known)]
    for key, value in content.items():
        if key not in names:
            yield f"{prefix + str(key)!r}{nearest(str(key), names)}"
        elif dataclasses.is_dataclass(part := getattr(known, key)) and isinstance(value, Mapping):
            yield from _unknown(value, part, f"{prefix}{key}.")


def _empty(content: Mapping[str, Any], known: Any, prefix: str = "") -> Iterator[str]:
    types = {item.name: str(item.type) for item in dataclasses.fields(known)}
    for key, value in content.items():
        if value is None and "None" not in types[key]:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(part := getattr(known, key)):
            yield from _empty(value, part, f"{prefix}{key}.")
