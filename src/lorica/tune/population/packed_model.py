"""A base on its way to other processes: modules are pickled, weights are arrays that nobody copies."""

from __future__ import annotations

import io
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn import Parameter


@dataclass(frozen=True)
class PackedModel:
    """A model in parts.

    Ray keeps the arrays once a machine, in shared memory that is read-only, and every process on it works on
    those very bytes: nothing is read or copied for each trial, and nothing can write to them.

    Args:
        modules: the model without its parameters, pickled.
        weights: the parameters as bytes, each with its dtype and shape.
    """

    modules: bytes
    weights: list[tuple[numpy.ndarray, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, model: nn.Module) -> PackedModel:
        """Take a model apart. Tied parameters stay tied."""
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(model)
        weights = [
            (p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), p.dtype, tuple(p.shape))
            for p in pickler.parameters.values()
        ]
        return cls(file.getvalue(), weights)

    def model(self) -> Any:
        """Put it together again, around the arrays as they are; its parameters are frozen."""
        with warnings.catch_warnings():
            # That they cannot be written to is the point.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            parameters = [
                Parameter(torch.from_numpy(array).view(dtype).view(shape), requires_grad=False)
                for array, dtype, shape in self.weights
            ]
        return _Unpickler(io.BytesIO(self.modules), parameters).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.parameters: dict[int, Parameter] = {}

    def persistent_id(self, obj: Any) -> int | None:
        """A parameter's number, in place of the parameter."""
        if not isinstance(obj, Parameter):
            return None
        self.parameters.setdefault(id(obj), obj)
        return list(self.parameters).index(id(obj))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parameters: list[Parameter]) -> None:
        super().__init__(file)
        self._parameters = parameters

    def persistent_load(self, pid: Any) -> Parameter:
        """The parameter of that number."""
        return self._parameters[pid]
