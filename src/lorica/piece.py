"""`Piece`: one thing that an adapter holds at one place of a model.

    A and B on a layer | a copy of a module | a copy of a parameter | rows of an embedding | an added part

Every verb on an adapted model is a loop over pieces, which calls `put`, `off`, `tensors`, `stand_ins` or
`claims`. How they are found is told in `lorica.pieces`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

Rows = frozenset[int] | None
"""Rows of a module that an adapter trains; None for all of it."""


class Held(NamedTuple):
    """A tensor of a piece.

    Args:
        key: its name in an adapter as a value (`Adapter.named_tensors`).
        live: its name among the model's parameters and buffers; None where it does not stand in the model at
            the moment.
        tensor: itself.
        buffer: whether it is none that trains.
    """

    key: str
    live: str | None
    tensor: Tensor
    buffer: bool = False


class Contents(NamedTuple):
    """What an `Adapter` holds, while it is put together: its `factors`, `extras` and `added`."""

    factors: dict[str, Any]
    extras: dict[str, Tensor]
    added: dict[str, Tensor]


Value = Callable[[str | None, Tensor], Tensor]


class Piece(ABC):
    """One thing that an adapter holds at one place of a model.

    It has its tensors from the moment that it is made, and only `put` and `off` touch the model: what can
    fail comes before.

    Args:
        path: of the module that it is for, or the name of the parameter.

    Attributes:
        module: at that path, where it is a module's; None elsewhere.
        section: of an `Adapter`, to which its tensors belong.
        places: whether something of it stands in the base's place while its adapter acts, or keeps others
            from acting beside it.
        optional: whether a file may leave it out; it then holds what the base has.
        called: whether a pass of the model must call its module, or it does nothing.
        rows_differ: whether each row of a batch can have a piece of its own.
        residual: whether something was taken out of a weight of the base for it.
        master: whether what stands in the base's place is float32, and the base's in half precision.
        mergeable: whether merging can put it into the base's weights.
        clash: why no other adapter may have its own of what this one claims; a format with the path.
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
        """Get on the model.

        Args:
            root: the model.
            state: the model's.
            name: of the adapter.
            trainable: whether the piece's tensors train.
        """

    @abstractmethod
    def off(self, root: nn.Module, name: str) -> None:
        """Get off the model, which is then at this place as it was before `put`."""

    @abstractmethod
    def tensors(self, name: str) -> Iterator[Held]:
        """The tensors of the piece, before `put` and after it."""

    def follow(self, paths: Mapping[nn.Module, str]) -> bool:
        """Go by the path that the piece's module has now; whether it is in the model still.

        Args:
            paths: module → path, of the whole model.
        """
        return True

    def saved(self, name: str) -> Iterator[Held]:
        """Those of its tensors that a file must hold: all of them."""
        return self.tensors(name)

    def give(self, name: str, contents: Contents, value: Value) -> None:
        """Put what must be saved into an adapter as a value.

        Args:
            name: of the adapter.
            contents: what it will hold.
            value: what to take for a tensor, by its live name.
        """
        section: dict[str, Tensor] = getattr(contents, self.section)
        for held in self.saved(name):
            section[held.key] = value(held.live, held.tensor)

    def otherwise(self, held: Held) -> Tensor:
        """What one of its tensors is where a file leaves it out, which it may if the piece is optional."""
        raise NotImplementedError

    def stand_ins(self, name: str) -> Mapping[str, Tensor]:
        """Name of a parameter or buffer of the base → what takes its place while the adapter acts."""
        return {}

    def left(self, tensor: Tensor) -> None:
        """Note what of this piece stood in the base's place until now: a model that moves has new buffers."""
        return

    def claims(self, name: str) -> Mapping[str, Rows]:
        """Paths and names of which no adapter beside this one may have its own → its rows there."""
        return {}

    def check_class(self) -> None:
        """Refuse to get off a module whose class something else changed since.

        Raises:
            StateError: naming the class.
        """
        return
