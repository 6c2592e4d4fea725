"""Embeddings that only hold a table for others: refused, for an update of one would not act."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from lorica.errors import TargetError, listing
from lorica.piece import Piece
from lorica.pieces import Kind, Search, register
from lorica.tree import Place, only_holds, tied_with


class LookedUp(Kind):
    """Finds no pieces: it looks at those that a LoRA has."""

    of_modules = (nn.Embedding,)

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        return ()

    def finish(self, search: Search) -> None:  # noqa: D102
        if search.lora is None:
            return
        try:
            check_looked_up(search.places, {*search.whole, *(target.path for target in search.targets)})
        except TargetError as error:
            if search.adapter is None:
                raise
            search.problems.append(str(error))


def check_looked_up(places: Iterable[Place], chosen: Collection[str]) -> None:
    """Refuse an embedding that is never called and only holds the table for others, as T5's `shared`.

    Args:
        places: the places of the whole model.
        chosen: paths of the modules to adapt or to train whole.

    Raises:
        TargetError: naming the embedding and those that look up in its table.
    """
    embeddings = [p for p in places if isinstance(p.module, nn.Embedding)]
    for place in embeddings:
        if place.path not in chosen:
            continue
        others = [path for path in tied_with(embeddings, place.module) if path != place.path]
        if only_holds(place, others):
            raise TargetError(
                f"{place.path} only holds the table that {listing(others)} look up in, and is not called "
                f"itself, so an update of it would not act; name {listing(others)} instead, or single rows "
                "in trainable_token_indices, which all of them share"
            )


register(LookedUp())
