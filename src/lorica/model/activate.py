"""Choosing which adapters act."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorica.state import adapted


class active:
    """Let exactly the named adapters act; their updates add up. As a context manager, undone on exit.

    They act on all rows, though others were `mixed` before. Like `torch.set_grad_enabled` it takes effect
    when it is made, so a plain call switches for good. It costs the same however many layers and adapters
    there are, and changes neither `requires_grad` nor the training mode.

    Threads and tasks of asyncio choose for themselves: what one chooses holds for no other. In the thread
    that adapted the model a choice is the model's too, for all that chose nothing; a task's block is not. A
    thread that is to go on with its caller's choice is started by `contextvars.copy_context().run`.

    Where parameters of an adapter stand in the base's place (trained biases, a start that was taken out of
    W0), they are one for all threads: a choice that exchanges them is refused in other threads, and while
    others are inside a block.

    Args:
        model: adapted model.
        names: an adapter's name, or several.
        rows: which acts on which row; `mixed` gives it.

    Raises:
        AdapterError: no such adapter, or two that cannot act together.
        StateError: an adapter is merged; or parameters would be exchanged under others' computations.
    """

    def __init__(self, model: nn.Module, names: str | Iterable[str], rows: Any = None) -> None:
        self._root, self._state = root, state = adapted(model)
        state.check_unmerged("choose another adapter")
        self._here, self._own, self._shared = state.last, state.own_choice(), state.shared
        state.activate(root, (names,) if isinstance(names, str) else tuple(names))
        state.decide(state.last._replace(rows=rows, resting=None))
        state.name_classes()

    def __enter__(self) -> None:
        """From here on it is a block: the thread's or task's own, and no longer the model's."""
        self._state.enter(self, self._shared)
        self._state.name_classes()

    def __exit__(self, *error: object) -> None:
        """Let those act that did before, as far as they are still there."""
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
