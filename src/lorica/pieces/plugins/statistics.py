"""Running statistics (batch norm): they move in training without a gradient, so each adapter has its own.

They replace the base's while their adapter acts, as trained biases do. So training moves the adapter's
statistics and leaves the base's bit for bit; a file holds those that moved. While no adapter acts, a pass
does not move the base's either (`mixed`, `disabled`, a frozen adapter): it moves copies, dropped after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lorica.layers import SavedModule
from lorica.layers.masters import CallHooks, guard
from lorica.piece import Beginning, Held, Piece, Rows
from lorica.pieces import Kind, Search, register
from lorica.state import AdapterState
from lorica.tree import join, walk, within_any


class RunningStatistic(Piece):
    """An adapter's own value of a buffer; where a file has none, the base's.

    Args:
        path: the buffer's name in the base.
        norm: the module that holds the buffer.
        leaf: the buffer's name in that module.
        own: the adapter's value.
    """

    places = True
    optional = True

    def __init__(self, path: str, norm: nn.Module, leaf: str, own: Tensor) -> None:
        super().__init__(path)
        self.norm, self.leaf, self.own = norm, leaf, own
        self.state: AdapterState | None = None

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        self.state = state

    def off(self, root: nn.Module, name: str) -> None:
        """Nothing to undo: an adapter that does not act replaces nothing."""

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        yield Held(self.path, self.path if self._stands() else None, self.live())

    def saved(self, name: str) -> Iterator[Held]:
        """The statistic, if it moved."""
        return self.tensors(name) if self.moved() else iter(())

    def otherwise(self, held: Held) -> Tensor:
        """The base's value."""
        return self._base()

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:
        """The base's value."""
        yield self.live(), self._base()

    def left(self, tensor: Tensor) -> None:  # noqa: D102
        self.own = tensor

    def stand_ins(self, name: str) -> Mapping[str, Tensor]:  # noqa: D102
        return {self.path: self.live()}

    def claims(self, name: str) -> Mapping[str, Rows]:  # noqa: D102
        return {self.path: None} if self.moved() else {}

    def moved(self) -> bool:
        """Whether it differs from the base's."""
        own = self.live()
        return not torch.equal(own, self._base().to(own))

    def live(self) -> Tensor:
        """The adapter's value: the model's buffer while the adapter acts."""
        held = self.norm._buffers[self.leaf] if self._stands() else self.own
        assert held is not None
        return held

    def _stands(self) -> bool:
        return self.state is not None and self.state.standing.get(self.path, ("", None))[1] is self

    def _base(self) -> Tensor:
        held: Tensor | None = self.state.originals.get(self.path) if self.state else None
        base = self.norm._buffers[self.leaf] if held is None else held
        assert base is not None
        return base


class Still(CallHooks):
    """Hooks around one layer's calls that keep the base's running statistics as they are."""

    def before(self, module: nn.Module, args: Any) -> None:
        """In training, replace the base's statistics by copies."""
        if not module.training or f"{self.own}running_mean" in self.state.originals:
            return
        with guard():
            self.inside += 1
            if self.inside == 1:
                self.kept = {leaf: b for leaf, b in module._buffers.items() if b is not None}
                module._buffers.update({leaf: buffer.clone() for leaf, buffer in self.kept.items()})

    def after(self, module: nn.Module, args: Any, output: object) -> None:
        """Put the base's own statistics back."""
        if not self.inside:
            return
        with guard():
            self.inside -= 1
            if not self.inside:
                module._buffers.update(self.kept)
                self.kept = {}


def keep_still(root: nn.Module, state: AdapterState) -> None:
    """Let no pass move the base's own running statistics, until `release`.

    Args:
        root: the model, before its first adapter.
        state: the model's state.
    """
    for path, module, _ in walk(root):
        if isinstance(module, _NormBase) and module._buffers.get("running_mean") is not None:
            Still(state, path).put(module)


def release(root: nn.Module) -> None:
    """Undo `keep_still`."""
    for module in root.modules():
        Still.off(module)


class RunningStatistics(Kind):
    """Finds the running statistics outside the modules that are trained whole."""

    of_modules = (_NormBase,)

    def opened(self, root: nn.Module, state: AdapterState) -> None:  # noqa: D102
        keep_still(root, state)

    def closed(self, root: nn.Module, state: AdapterState) -> None:  # noqa: D102
        release(root)

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        whole = [*search.whole, *(p.path for p in search.places if isinstance(p.module, SavedModule))]
        given = search.adapter.extras if search.adapter is not None else {}
        for path, module, _ in [search.itself, *search.places]:
            if not isinstance(module, _NormBase) or within_any(path, whole):
                continue
            for leaf, buffer in module._buffers.items():
                name = join(path, leaf)
                if buffer is not None and (search.trainable or name in given):
                    yield RunningStatistic(
                        name, module, leaf, buffer if search.dry else buffer.detach().clone()
                    )


register(RunningStatistics())
