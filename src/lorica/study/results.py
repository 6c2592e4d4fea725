"""The base class of a study's results: a dataclass that becomes plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lorica.config import LoraConfig


class Result:
    """A frozen dataclass of figures."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as values for JSON; tensors become nested lists."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        return {field.name: _plain(getattr(self, field.name)) for field in fields}


def _plain(value: Any) -> Any:
    if isinstance(value, (Result, LoraConfig)):
        return value.to_dict()
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
