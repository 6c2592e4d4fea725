"""From `trainable_token_indices` to the tables whose rows they are, and the modules tied to those."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import Parameter

from lorica.config import LoraConfig
from lorica.errors import TargetError, listing, nearest
from lorica.model.adaptable import check_rows
from lorica.model.selection import ending_in, within_any
from lorica.model.structure import Place, walk
from lorica.model.tied import tied_with


class TokenTarget(NamedTuple):
    """A table some of whose rows train.

    Args:
        path: of the module that saves them.
        indices: which rows.
        modules: path → module that uses them: itself, and those tied to it.
    """

    path: str
    indices: tuple[int, ...]
    modules: dict[str, nn.Module]

    @property
    def weight(self) -> Parameter:
        """The whole table (vocabulary, dim)."""
        weight = self.modules[self.path]._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def shape(self) -> torch.Size:
        """Shape of the rows (tokens, dim)."""
        return torch.Size((len(self.indices), *self.weight.shape[1:]))


def token_targets(
    root: nn.Module, config: LoraConfig | None, adapted: Iterable[str], saved: Collection[str]
) -> list[TokenTarget]:
    """The tables whose rows a configuration trains.

    Rows of the input embedding are those of whatever is tied to it too, as a rule the output head.

    Args:
        root: the model.
        config: its `trainable_token_indices` says which rows; None trains none.
        adapted: paths of the modules with an update.
        saved: paths of the modules trained whole.

    Raises:
        TargetError: there is no such table or row, or something else of the configuration changes it too.
    """
    if config is None or config.trainable_token_indices is None:
        return []
    places = [place for place in walk(root) if place.path]
    wanted = _wanted(root, places, config.trainable_token_indices)
    targets: list[TokenTarget] = []
    for path, indices in wanted.items():
        if any(path in target.modules for target in targets):
            continue
        module = next(place.module for place in places if place.path == path)
        tied = [path]
        if module is _input_embedding(root) or _input_embedding(root) is None:
            tied += [p for p in tied_with(places, module) if p != path]
            apart = [p for p in tied if wanted.get(p, indices) != indices]
            if apart and config.ensure_weight_tying:
                raise TargetError(
                    "Cannot ensure weight tying when different token indices are specified: "
                    f"trainable_token_indices names other tokens of {listing(apart)} than of {path}, but "
                    "with ensure_weight_tying they share their rows; name the same, or leave one of them out"
                )
            tied = [path] if apart else tied
        targets.append(TokenTarget(path, indices, {p.path: p.module for p in places if p.path in tied}))
    _check(places, targets, set(adapted), saved)
    return targets


def starting_rows(target: TokenTarget) -> Parameter:
    """The rows as the base has them, in float32 or the base's higher precision."""
    weight = target.weight.detach()
    rows = weight[torch.tensor(target.indices, device=weight.device)]
    return Parameter(rows.to(torch.promote_types(weight.dtype, torch.float32)))


def _wanted(
    root: nn.Module, places: list[Place], given: list[int] | dict[str, list[int]]
) -> dict[str, tuple[int, ...]]:
    """Path → rows."""
    if isinstance(given, list):
        table = _input_embedding(root)
        found = [p.path for p in places if p.module is table] or [
            p.path for p in ending_in(places, ["embed_tokens"])
        ]
        if len(found) != 1:
            raise TargetError(
                f"{type(root).__name__} does not say which is its input embedding (get_input_embeddings); "
                'name it: trainable_token_indices={"embed_tokens": [...]}'
            )
        return {found[0]: tuple(given)}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, indices in given.items():
        hits = ending_in(places, [name])
        if not hits:
            tables = [p.path for p in places if isinstance(p.module, nn.Embedding)]
            raise TargetError(
                f"Target modules {{{name!r}}} not found in the base model. trainable_token_indices names "
                f"{name!r}, which the model does not have"
                f"{nearest(name, tables)}. The model's embeddings: {listing(tables) or 'none'}"
            )
        for place in hits:
            if wanted.setdefault(place.path, tuple(indices)) != tuple(indices):
                raise TargetError(
                    f"two names of trainable_token_indices mean {place.path}, with different tokens"
                )
    return wanted


def _input_embedding(root: nn.Module) -> nn.Module | None:
    try:
        return root.get_input_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _check(
    places: Iterable[Place], targets: Iterable[TokenTarget], adapted: set[str], saved: Collection[str]
) -> None:
    indices = {path: target.indices for target in targets for path in target.modules}
    for place in places:
        if place.path not in indices:
            continue
        check_rows(place, indices[place.path])
        for field, same, what in (
            ("target_modules", place.path in adapted, ""),
            (
                "modules_to_save",
                within_any(place.path, saved),
                "The embedding layer is already marked to be trained fully: ",
            ),
        ):
            if same:
                raise TargetError(
                    f"{what}{place.path}: rows of it train (trainable_token_indices), by itself or as tied "
                    f"to an embedding that has some, so it cannot be in {field} too"
                )
