"""Whether the first axis of a layer's input is the batch, so that its rows can have adapters of their own.

The shapes of one pass do not show it: a table may be looked up by as many positions as the batch has rows. So
the model first runs one row alone; a layer's first axis is the batch if the whole batch has as many times
more entries there as it has rows.

    alone     tokens (1, 7, d)    positions (7,)       windows (4, 9, d)
    3 rows    tokens (3, 7, d)    positions (7,) no    windows (12, 9, d)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import AdapterError, StateError

Shapes = dict[Hashable, list[torch.Size]]
"""Layer → shapes of its inputs, call after call."""


@dataclass(eq=False)
class Axes:
    """Knowledge of the layers' inputs and the running call.

    Args:
        root: the model.
        known: layer and number of axes → whether one row alone is one entry of the first axis (True) or
            several (False); the same for every mixture on a model.
        expansion: number of times that `generate` repeats each row, for beams.
        batch: rows of the running call; None outside calls of the model.
        outermost: the module that was called.
        alone: shapes of the layers' inputs for one row alone, while some layers are not known.
        lengths: that row's possible numbers of tokens, one per input of the call.
        calls: number of calls of each of those layers since.
        failure: why one row alone could not be run.
    """

    root: nn.Module | None = None
    known: dict[tuple[Hashable, int], bool] = field(default_factory=dict)
    expansion: int = 1
    batch: int | None = None
    outermost: nn.Module | None = None
    alone: Shapes = field(default_factory=dict)
    lengths: frozenset[int] = frozenset()
    calls: dict[Hashable, int] = field(default_factory=dict)
    failure: Exception | None = None

    def times(self, layer: Hashable, x: Tensor, names: int) -> int:
        """Number of entries of the first axis of `x` per named row.

        Raises:
            AdapterError: naming the layer, where its first axis is not the batch, or may not be.
        """
        key = (layer, x.dim())
        if self.batch is not None and key not in self.known:
            self.known[key] = self._look(layer, x, self.batch)
        times, rest = divmod(x.shape[0], names)
        allowed = times in (1, self.expansion) if self.known.get(key) else times > 0
        if rest or not allowed:
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{names} and {x.shape[0]} respectively. "
                f"{names} adapters were named, one for each row, but {self._called(layer)} sees {x.shape[0]} "
                "rows"
            )
        return times

    def check_batch(self, rows: int, names: int) -> None:
        """Refuse a call whose number of rows differs from the number of names.

        Raises:
            AdapterError: the numbers differ, and no beams explain it.
        """
        if rows not in (names, names * self.expansion):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{names} and {rows} respectively. "
                f"{names} adapters were named, one for each row, but the model sees {rows} rows; name an "
                "adapter, or None, for each (generate repeats them for beams by itself)"
            )

    def _look(self, layer: Hashable, x: Tensor, batch: int) -> bool:
        """Whether one row alone is one entry of the first axis of `x`, in this call of the layer."""
        call = self.calls.get(layer, 0)
        self.calls[layer] = call + 1
        shapes = self.alone.get(layer, [])
        shown = tuple(x.shape)
        if call >= len(shapes):
            why = (
                f"showing the model one row alone failed ({type(self.failure).__name__}: {self.failure})"
                if self.failure is not None
                else "it is called otherwise for one row alone"
            )
            raise AdapterError(
                f"{self._called(layer)}: whether the first axis of its input {shown} is the batch cannot be "
                f"told, for {why}; use one adapter for all rows (lorica.active), or leave this layer out"
            )
        alone = shapes[call]
        scaled = bool(alone) and shown == (batch * alone[0], *alone[1:])
        # Flattened tokens must be all of them: a selection may differ from row to row.
        whole = len(alone) > 2 or alone[:1] == (1,) or alone[0] in self.lengths
        if not scaled or not whole:
            raise AdapterError(
                f"{self._called(layer)}: the first axis of its input {shown} is not the batch (one row "
                f"alone gives {tuple(alone)}), so adapters on it cannot differ by row; use one adapter for "
                "all rows (lorica.active), or leave this layer out"
            )
        return alone[0] == 1

    def _called(self, layer: Hashable) -> str:
        named = self.root.named_modules() if self.root is not None else ()
        return next((path for path, module in named if module is layer and path), "a layer")


class ByRow(ABC):
    """The form of `AdapterState.rows` in a mixture: the adapter of each row of a layer's input."""

    @abstractmethod
    def groups(
        self, layer: Hashable, x: Tensor, present: Collection[str]
    ) -> Iterator[tuple[str | None, Tensor]]:
        """Each adapter among `present` with the indices of its rows of `x`; None has the other rows."""

    def call(
        self, module: Any, present: Collection[str], call: Callable[..., Any], /, *given: Any, **kwargs: Any
    ) -> Tensor:
        """The outputs of a module's copies, each for its own rows, in the order of the rows.

        Args:
            module: the module (`SwappedModule`).
            present: adapters that have a copy of it.
            call: called with an adapter's name, or None for the module itself, and with the arguments, of
                which the first is that adapter's rows of it.
            given: arguments of the module's call.
            kwargs: likewise.

        Raises:
            StateError: the first argument, or a result, is no tensor.
        """
        kind = module.base_class.__name__
        if not given or not isinstance(given[0], Tensor):
            raise StateError(
                f"{kind} is called without a tensor in the first place ({', '.join(kwargs) or 'nothing'}), "
                "so it is not known what of its call are the rows; let one adapter act for the whole batch"
            )
        x, *args = given
        parts, places = [], []
        for name, index in self.groups(module, x, present):
            parts.append(call(name, x.index_select(0, index), *args, **kwargs))
            places.append(index)
        if not isinstance(parts[0], Tensor):
            raise StateError(
                f"{kind} returns a {type(parts[0]).__name__}; only one tensor can be put together row by row"
            )
        return torch.cat(parts).index_select(0, torch.cat(places).argsort())


@dataclass(eq=False)
class Witness(ByRow):
    """Replaces `Rows` while the model runs one row alone: records shapes, and no adapter acts."""

    shapes: Shapes = field(default_factory=dict)

    def add(self, layer: Hashable, y: Tensor, x: Tensor, *_: object) -> Tensor:
        """Note the input."""
        self.shapes.setdefault(layer, []).append(x.shape)
        return y

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """Note the input."""
        return self.add(layer, layer.base_forward(x), x)

    def groups(self, layer: Hashable, x: Tensor, present: object) -> Iterator[tuple[None, Tensor]]:
        """Note the input; all rows are the base's."""
        self.shapes.setdefault(layer, []).append(x.shape)
        yield None, torch.arange(x.shape[0], device=x.device)
