"""`Piece`: one thing that an adapter holds at one place of a model.

    A and B on a layer | a copy of a module | a copy of a parameter | rows of an embedding | an added part

Every verb on an adapted model is a loop over pieces that calls `put`, `off`, `tensors`, `stand_ins` or
`claims`. `lorica.pieces` finds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lorica.errors import AdapterError

Rows = frozenset[int] | None
"""Rows of a module that an adapter trains; None for all of it."""


class Held(NamedTuple):
    """A tensor of a piece.

    Args:
        key: its name in an adapter as a value (`Adapter.named_tensors`).
        live: its name among the model's parameters and buffers; None while the model does not hold it.
        tensor: the tensor itself.
        buffer: whether it is a buffer, which never trains.
    """

    key: str
    live: str | None
    tensor: Tensor
    buffer: bool = False


class Beginning(NamedTuple):
    """From what an adapter's pieces start anew, on a model that was made without values.

    Args:
        root: the model; its base has its values.
        state: the model's.
        config: the adapter's.
        seed: fixes how what is drawn starts.
    """

    root: nn.Module
    state: Any
    config: Any
    seed: int


class Contents(NamedTuple):
    """The `factors`, `extras` and `added` of an `Adapter` that is being built."""

    factors: dict[str, Any]
    extras: dict[str, Tensor]
    added: dict[str, Tensor]


Value = Callable[[str | None, Tensor], Tensor]


class Piece(ABC):
    """One thing that an adapter holds at one place of a model.

    A piece holds its tensors as soon as it is made. Only `put` and `off` touch the model, so whatever can
    fail has failed before.

    Args:
        path: the module's path, or the parameter's name.

    Attributes:
        module: the module at that path; None for a parameter's piece.
        section: the section of an `Adapter` that holds its tensors.
        places: whether it replaces something of the base while its adapter acts, or keeps other adapters
            from acting beside its own.
        optional: whether a file may leave it out; the piece then holds the base's values.
        called: whether it acts only when the model calls its module.
        rows_differ: whether each row of a batch can have a piece of its own.
        residual: whether its start was taken out of a weight of the base.
        master: whether it replaces a half-precision tensor of the base by a float32 one.
        mergeable: whether it can be merged into the base's weights.
        clash: message where two adapters claim the same thing; a format with the path.
    """

    module: Any = None
    section: ClassVar[str] = "extras"
    places: bool = False
    optional: ClassVar[bool] = False
    called: ClassVar[bool] = False
    rows_differ: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    residual: bool = False
    master: bool = False
    clash: ClassVar[str] = "each brings its own {}; updates of rank r add up, parameters trained whole do not"

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def put(self, root: nn.Module, state: Any, name: str, *, trainable: bool) -> None:
        """Put the piece on the model.

        Args:
            root: the model.
            state: the model's `AdapterState`.
            name: the adapter's name.
            trainable: whether the piece's tensors train.
        """

    @abstractmethod
    def off(self, root: nn.Module, name: str) -> None:
        """Take the piece off the model, which is then what it was before `put`."""

    @abstractmethod
    def tensors(self, name: str) -> Iterator[Held]:
        """The tensors of the piece, before `put` and after it."""

    def follow(self, paths: Mapping[nn.Module, str]) -> bool:
        """Take the module's present path; returns whether the model still has the module.

        Args:
            paths: module → path, for every module of the model.
        """
        return True

    def saved(self, name: str) -> Iterator[Held]:
        """The tensors that a file must hold; all of them unless a kind says otherwise."""
        return self.tensors(name)

    def give(self, name: str, contents: Contents, value: Value) -> None:
        """Add the piece's saved tensors to an adapter that is being built.

        Args:
            name: the adapter's name.
            contents: the adapter's contents so far.
            value: (live name, tensor) → the values to save.
        """
        section: dict[str, Tensor] = getattr(contents, self.section)
        for held in self.saved(name):
            section[held.key] = value(held.live, held.tensor)

    def otherwise(self, held: Held) -> Tensor:
        """The values of a tensor that a file leaves out; for optional pieces."""
        raise NotImplementedError

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:
        """The tensors of the piece, each with the value that it starts with, as `lorica.adapt` would have it.

        Args:
            name: of the adapter.
            at: from what.

        Raises:
            AdapterError: that cannot be told.
        """
        raise AdapterError(
            f"{self.path}: a {type(self).__name__} does not know how it starts on a model that was made "
            "without values; make the model whole, or lorica.load_weights what it holds"
        )

    def unlike(self, root: nn.Module, name: str, adapter: Any) -> Iterator[str]:
        """Other meanings of an adapter of the same tensors, a line each.

        Args:
            root: the model.
            name: of the adapter that the piece is of.
            adapter: the other one, as a value.
        """
        return iter(())

    def stand_ins(self, name: str) -> Mapping[str, Tensor]:
        """Name of a parameter or buffer of the base → its replacement while the adapter acts."""
        return {}

    def left(self, tensor: Tensor) -> None:
        """Take back a tensor that stood in the model: a model that moves makes new buffers."""
        return

    def claims(self, name: str) -> Mapping[str, Rows]:
        """Path or name that no adapter acting beside this one may claim → the rows claimed."""
        return {}

    def check_class(self) -> None:
        """Refuse to leave a module whose class something else has changed since `put`.

        Raises:
            StateError: naming the class.
        """
        return
