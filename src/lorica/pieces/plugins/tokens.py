"""Rows of an embedding that train by themselves (`trainable_token_indices`), such as new tokens'."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import TOKEN_ROWS, Adapter
from lorica.check import check_adaptable, layer_class
from lorica.config import LoraConfig
from lorica.errors import AdapterError, TargetError, listing, nearest
from lorica.layers import LoraEmbedding, LoraLayer, LoraLinear, SavedModule, TrainedTokens
from lorica.piece import Beginning, Held, Piece, Rows
from lorica.pieces import Kind, Search, register
from lorica.state import AdapterState
from lorica.tree import Place, ending_in, input_embedding, tied_with, walk, whole, within_any


class TokenRows(Piece):
    """Trained rows of a table, in it and in the modules that are tied to it.

    Args:
        path: of the module that saves them.
        indices: which rows.
        modules: path → module that uses them: itself, and those tied to it.
    """

    places = True

    def __init__(self, path: str, indices: tuple[int, ...], modules: dict[str, nn.Module]) -> None:
        super().__init__(path)
        self.indices, self.modules = indices, modules
        self.rows = Parameter(torch.empty(0))

    def start(self) -> None:
        """Take the rows as the base has them, in float32 or the base's higher precision."""
        weight = self.modules[self.path]._parameters["weight"]
        assert weight is not None
        rows = weight.detach()[torch.tensor(self.indices, device=weight.device)]
        self.rows = Parameter(rows.to(torch.promote_types(weight.dtype, torch.float32)))

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        self.rows.requires_grad = trainable
        for path, module in self.modules.items():
            host = module if isinstance(module, TrainedTokens) else TrainedTokens.take(module, state)
            host.add_rows(name, self.indices, self.rows, tied=path != self.path)

    def off(self, root: nn.Module, name: str) -> None:  # noqa: D102
        for host in self.modules.values():
            assert isinstance(host, TrainedTokens)
            host.remove_rows(name)
            if not host.adapters:
                host.leave()

    def check_class(self) -> None:  # noqa: D102
        for host in self.modules.values():
            if isinstance(host, TrainedTokens):
                host.check_own_class()

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        host: Any = self.modules[self.path]
        key = f"{self.path}.{TOKEN_ROWS}"
        on = isinstance(host, TrainedTokens) and name in host.token_adapter.indices
        rows = host.token_adapter.trainable_tokens_delta[name] if on else self.rows
        yield Held(key, f"{key}.{name}", rows)

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows that the table has."""
        for held in self.tensors(name):
            weight = whole(at.state.base_parameter(at.root, f"{self.path}.weight")).detach()
            yield held.tensor, weight[torch.tensor(self.indices, device=weight.device)]

    def unlike(self, root: nn.Module, name: str, adapter: Adapter) -> Iterator[str]:
        """Rows of other tokens."""
        if not any(key.endswith(TOKEN_ROWS) for key in adapter.extras):
            return
        try:
            found = token_rows(root, adapter.config.members()[0], (), ())
        except TargetError as error:
            yield str(error)
            return
        theirs = {path: table.indices for table in found for path in table.modules}
        for path in self.modules:
            if path in theirs and theirs[path] != self.indices:
                yield f"tokens of {path}: {[*theirs[path]]} in the adapter, {[*self.indices]} on the model"

    def claims(self, name: str) -> Mapping[str, Rows]:  # noqa: D102
        return dict.fromkeys(self.modules, frozenset(self.indices))


class TrainedRows(Kind):
    """Finds the tables whose rows `trainable_token_indices` names."""

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        adapted = {target.path for target in search.targets if target.parameter is None}
        if search.adapter is not None:
            adapted = {*search.adapter.factors}
        try:
            pieces = token_rows(search.root, search.lora, adapted, search.whole)
        except TargetError as error:
            if search.adapter is None:
                raise
            raise AdapterError(
                f"the adapter does not fit this {type(search.root).__name__}:\n  {error}"
            ) from None
        for piece in pieces:
            piece.start()
        return pieces


def token_rows(
    root: nn.Module, config: LoraConfig | None, adapted: Iterable[str], saved: Collection[str]
) -> list[TokenRows]:
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
    targets: list[TokenRows] = []
    for path, indices in wanted.items():
        if any(path in target.modules for target in targets):
            continue
        module = next(place.module for place in places if place.path == path)
        tied = [path]
        if module is input_embedding(root) or input_embedding(root) is None:
            tied += [p for p in tied_with(places, module) if p != path]
            apart = [p for p in tied if wanted.get(p, indices) != indices]
            if apart and config.ensure_weight_tying:
                raise TargetError(
                    "Cannot ensure weight tying when different token indices are specified: "
                    f"trainable_token_indices names other tokens of {listing(apart)} than of {path}, but "
                    "with ensure_weight_tying they share their rows; name the same, or leave one of them out"
                )
            tied = [path] if apart else tied
        targets.append(TokenRows(path, indices, {p.path: p.module for p in places if p.path in tied}))
    _check(places, targets, set(adapted), saved)
    return targets


def _wanted(
    root: nn.Module, places: list[Place], given: list[int] | dict[str, list[int]]
) -> dict[str, tuple[int, ...]]:
    """Path → rows."""
    if isinstance(given, list):
        table = input_embedding(root)
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


def _check(
    places: Iterable[Place], targets: Iterable[TokenRows], adapted: set[str], saved: Collection[str]
) -> None:
    indices = {path: target.indices for target in targets for path in target.modules}
    for place in places:
        if place.path not in indices:
            continue
        _check_rows(place, indices[place.path])
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


def _check_rows(place: Place, indices: Iterable[int]) -> None:
    """Refuse a module whose rows cannot be trained by themselves.

    Raises:
        TargetError: naming the module.
    """
    path, module, parent = place
    if not isinstance(module, TrainedTokens):
        kind = type(module).__name__
        if isinstance(module, (LoraLayer, SavedModule)):
            raise TargetError(f"{path}: another adapter has made it a {kind}; leave out its tokens")
        layer = layer_class(module, parent)
        if layer not in (LoraEmbedding, LoraLinear):
            raise TargetError(
                f"{path} is a {kind}; trainable_token_indices takes embeddings, and plain linear heads"
            )
        check_adaptable(place, layer)
        if getattr(module, "max_norm", None) is not None:
            raise TargetError(
                f"{path} rescales its rows when it looks them up (max_norm), so trained rows would not "
                "stay as trained; leave out its tokens"
            )
    rows = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    beyond = [str(index) for index in indices if index >= rows]
    if beyond:
        raise TargetError(
            f"{path} has {rows} rows, and trainable_token_indices names {listing(beyond)}; resize it first "
            "(model.resize_token_embeddings)"
        )


register(TrainedRows(), "trainable_token_indices")
