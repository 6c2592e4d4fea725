"""The names of a head's classes, which a model's configuration holds and the base's does not know.

    acting adapter         b (own head)     a (own head)     none, or one without a head
    config.id2label        b's              a's              the base's

What the configuration holds while a head acts are that head's: who writes names into it names its classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorica.adapter import Adapter
from lorica.choice import Choice
from lorica.state import AdapterState

_Names = tuple[Any, Any]
"""`id2label` and `label2id`."""


@dataclass(eq=False)
class ClassNames:
    """Whose names a configuration holds.

    Args:
        config: of the model.
        base: the base's own, while others are in it.
        own: adapter with a head of its own → the head's, while others are in it.
        shown: the adapter whose names are in it; None for the base.
    """

    config: Any
    base: _Names
    own: dict[str, _Names] = field(default_factory=dict)
    shown: str | None = None

    def follow(self, choice: Choice) -> None:
        """Have the configuration hold the names of the head that acts for the model."""
        acting = choice.names if choice.rows is None else getattr(choice.rows, "names", ())
        heads = [name if name in self.own else None for name in dict.fromkeys(acting)]
        if choice.rows is None:
            heads = [name for name in heads if name is not None] or [None]
        self.note()
        # Of rows with heads of their own no one has the word, unless they name their classes alike.
        alike = heads and all(self.of(head) == self.of(heads[0]) for head in heads)
        self.shown = heads[0] if alike else None
        self.config.id2label, self.config.label2id = self.of(self.shown)

    def note(self) -> None:
        """Keep what is in the configuration now: somebody may have named the classes since."""
        now = self.config.id2label, self.config.label2id
        if self.shown is None:
            self.base = now
        else:
            self.own[self.shown] = now

    def of(self, head: str | None) -> _Names:
        """An adapter's names, or the base's."""
        return self.base if head is None else self.own[head]


def names_of(
    root: nn.Module, state: AdapterState, name: str, extras: Mapping[str, Tensor]
) -> tuple[str, ...] | None:
    """Names of the classes, where an adapter has the head whose outputs they are; None where it has none.

    Args:
        root: the model.
        state: the model's.
        name: of the adapter.
        extras: what it trained whole.
    """
    given = getattr(getattr(root, "config", None), "id2label", None) or {}
    kept: ClassNames | None = state.classes
    if kept is not None and name in kept.own:
        kept.note()
        given = kept.own[name][0]
    try:
        names = tuple(str(given[place]) for place in range(len(given)))
    except KeyError:
        return None
    unnamed = all(name == f"LABEL_{place}" for place, name in enumerate(names))
    return None if unnamed or not _heads(extras, len(names)) else names


def give(root: nn.Module, state: AdapterState, name: str) -> None:
    """Note that an adapter brings its own head, if it does; its classes are named as the base's are.

    Args:
        root: the model.
        state: the model's.
        name: of the adapter, which is on the model.
    """
    config = getattr(root, "config", None)
    names = getattr(config, "id2label", None)
    if not names or not _heads(dict(_whole(state, name)), len(names)):
        return
    if state.classes is None:
        state.classes = ClassNames(config, (config.id2label, config.label2id))  # type: ignore[union-attr]
    kept: ClassNames = state.classes
    kept.note()
    kept.own[name] = dict(kept.base[0]), dict(kept.base[1] or {})


def take(state: AdapterState, name: str, adapter: Adapter) -> None:
    """Name the classes of an adapter's head as a file does, if it does."""
    kept: ClassNames | None = state.classes
    names = adapter.classes
    if kept is None or name not in kept.own or names is None or len(kept.own[name][0]) != len(names):
        return
    kept.note()
    kept.own[name] = dict(enumerate(names)), {label: place for place, label in enumerate(names)}
    if kept.shown == name:
        kept.config.id2label, kept.config.label2id = kept.own[name]


def _whole(state: AdapterState, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an adapter trains whole."""
    for piece in state.pieces[name]:
        if piece.section == "extras":
            yield from ((held.key, held.tensor) for held in piece.tensors(name))


def _heads(whole: Mapping[str, Tensor], outputs: int) -> bool:
    return any(
        name.endswith(".weight") and tensor.dim() == 2 and tensor.shape[0] == outputs
        for name, tensor in whole.items()
    )
