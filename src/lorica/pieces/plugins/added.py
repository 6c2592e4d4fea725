"""Parts that a method adds beside modules of the base: bottlenecks, prefixes."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lorica.check import check_replaceable
from lorica.errors import TargetError, listing
from lorica.layers import Part, Plan, SwappedModule
from lorica.layers.plugins.added import without_outermost
from lorica.piece import Beginning, Held, Piece, Rows
from lorica.pieces import KINDS, Kind, Search
from lorica.state import AdapterState
from lorica.tree import within_any


class AddedPart(Piece):
    """A part beside a module.

    Args:
        part: what is added, and where.
    """

    section = "added"
    places = True
    mergeable = False
    rows_differ = False

    def __init__(self, part: Part) -> None:
        super().__init__(part.path)
        self.part = part

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        host: Any = self.part.module
        if not isinstance(host, self.part.host):
            with without_outermost(host):
                self.part.host.take(host, state)
        host.add_part(name, self.part.part.requires_grad_(trainable))

    def off(self, root: nn.Module, name: str) -> None:  # noqa: D102
        host: Any = self.part.module
        host.remove_part(name)
        if not host.parts:
            with without_outermost(host):
                host.leave()

    def check_class(self) -> None:  # noqa: D102
        if isinstance(self.part.module, SwappedModule):
            self.part.module.check_own_class()

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        for key, parameter in self.part.tensors():
            leaf = key.removeprefix(f"{self.part.place}.")
            yield Held(key, f"{self.part.place}.{name}.{leaf}", parameter)

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:
        """As the method that added it draws it anew."""
        values = {
            key: value
            for config in at.config.members()[1]
            for kind in KINDS
            if isinstance(kind, MethodKind) and config.method in kind.keys
            for part in kind.plan(config, at.root, (), at.seed).parts
            for key, value in part.tensors()
        }
        for held in self.tensors(name):
            yield held.tensor, values[held.key]

    def claims(self, name: str) -> Mapping[str, Rows]:  # noqa: D102
        return {self.part.place: None}


class MethodKind(Kind):
    """The changes to a model by another method than LoRA; a subclass says which, by `plan`."""

    @abstractmethod
    def plan(self, config: Any, root: nn.Module, whole: Collection[str], seed: int) -> Plan:
        """The method's plan: parameters of the model that train, and parts to add; the model stays as it is.

        Args:
            config: the method's.
            root: the model.
            whole: paths of the modules trained whole, which are somebody else's to train.
            seed: fixes how what it adds starts.

        Raises:
            TargetError: the architecture cannot take the method.
        """

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        for config in search.methods:
            if config.method in self.keys:
                plan = self.plan(config, search.root, search.whole, search.seed)
                search.trained += plan.trained
                for part in plan.parts:
                    _check_host(part, search.whole)
                    yield AddedPart(part)

    def finish(self, search: Search) -> None:  # noqa: D102
        parts = [piece.part for piece in search.of(AddedPart)]
        taken = Counter(id(part.module) for part in parts)
        twice = [part.path for part in parts if taken[id(part.module)] > 1]
        if twice:
            raise TargetError(
                f"two of the methods add to {listing(dict.fromkeys(twice))}; make two adapters of them"
            )


def _check_host(part: Part, whole: Collection[str]) -> None:
    module = part.module
    free = not isinstance(module, SwappedModule) or isinstance(module, part.host)
    mixin: Any = type(module).swapped_by if isinstance(module, SwappedModule) else None
    free = free or mixin.outermost
    if not free or (within_any(part.path, whole) and part.path):
        raise TargetError(
            f"{part.path or 'the model'} is a {type(module).__name__} for another adapter, and cannot take a "
            f"{part.host.own_modules[0]} beside that; detach the other, or leave this module out of it"
        )
    check_replaceable(part.path or "the model", module)
