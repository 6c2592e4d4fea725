"""Choosing which adapters act."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorica.choice import names_in
from lorica.state import adapted


class active:
    """Let exactly the named adapters act; their updates add up. As a context manager, undone on exit.

    They act on every row and end a mixture (`mixed`). Like `torch.set_grad_enabled`, this takes effect when
    it is made, so a plain call switches for good. Its cost does not depend on the number of layers or
    adapters, and it changes neither `requires_grad` nor the training mode.

    Gradient checkpointing computes blocks again in the backward pass, by torch's `checkpoint` of either kind
    with the adapters that acted in the forward pass, wherever `backward` is called. Where these cannot act
    any more, since they exchanged parameters of the base, `backward` raises `StateError`. Before torch 2.8,
    call `backward` inside the block where `use_reentrant=False`.

    Each thread and each task of asyncio chooses for itself. A choice in the thread that adapted the model
    also holds for threads and tasks that chose nothing; a task's block does not. To start a thread with its
    caller's choice, use `contextvars.copy_context().run`.

    Parameters of an adapter that replace the base's (trained biases, a start subtracted from W0) are shared
    by all threads. A choice that exchanges them is refused in other threads, and while others are inside a
    block.

    Args:
        model: adapted model.
        names: an adapter's name, or several.
        rows: the adapter of each row; from `mixed`.

    Raises:
        AdapterError: no such adapter, or two that cannot act together.
        StateError: an adapter is merged; or parameters would be exchanged under others' computations.
    """

    def __init__(self, model: nn.Module, names: str | Iterable[str], rows: Any = None) -> None:
        self._root, self._state = root, state = adapted(model)
        state.check_unmerged("choose another adapter")
        self._here, self._own, self._shared = state.last, state.own_choice(), state.shared
        state.activate(root, names_in(names))
        state.decide(state.last._replace(rows=rows, resting=None))
        state.name_classes()

    def __enter__(self) -> None:
        """Make the choice a block's: it holds for this thread or task alone."""
        self._state.enter(self, self._shared)
        self._state.name_classes()

    def __exit__(self, *error: object) -> None:
        """Let the adapters act that did before, except those detached since."""
        state = self._state
        state.check_unmerged("leave the choice of another adapter")
        now = state.shared
        state.activate(self._root, state.present(self._here).names)
        own = None if self._own is None else state.present(self._own)
        state.leave(self, own, state.present(self._shared), now)
        state.name_classes()


def disabled(model: nn.Module) -> active:
    """Let no adapter act: the base itself. Takes effect at once; as a context manager, undone on exit."""
    return active(model, ())
