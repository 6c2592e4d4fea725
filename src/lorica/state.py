"""What a model carries: its adapters by name, each a list of pieces, and which of them act.

One state is shared by a model and all its adapted layers, so that choosing another adapter costs the same
however many layers or adapters there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.choice import Choice, Choices
from lorica.config import AdapterConfig
from lorica.errors import AdapterError, StateError, listing, nearest
from lorica.piece import Piece, Rows
from lorica.tree import owner_of, parameter_at, put_at, table_of, walk

STATE = "lorica_state"
"""Attribute of the adapted model that holds its state."""
_RESERVED = frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))


@dataclass(eq=False)
class AdapterState(Choices):
    """State shared by an adapted model and its layers; `Choices` says which adapters act.

    Args:
        configs: adapter name → how it was made, in the order of arrival.
        pieces: adapter name → all that it holds.
        originals: parameters and buffers of the base whose place is taken at the moment.
        standing: their names → the adapter whose own stands there, and its piece.
        anchor: a parameter of the base in half precision that stands in the model, if there is one, and the
            dtype that it came in; by it a model is known to have moved to another.
        rounded: copies of parameters → what stands in the base's place for them while merged, rounded to its
            dtype; None while nothing is.
        axes: what mixtures have found out about the layers' inputs.
        shown: the kinds of calls for which the model was shown one row alone.
        hooks: on the model and its parts; until `detach`.
        frozen: parameters that `adapt` froze and `detach` thaws.
        layouts: quantized layers that `adapt` keeps from repacking their weights, until `detach`.
        classes: the names of the classes of each head, where adapters bring their own.
        labels: of the call that is running, where a prefix needs them.
        layout: where a prefix stands in the call that is running.
        stack: how the list of blocks was exchanged (`layer_replication`), until `detach`.
        aside: what merging took off the model and `restore` puts back.
        opened: kinds of pieces that have something to undo when the last adapter is off.
        watch: the hook that looks for layers that a pass does not call.
        uncalled: kinds of layers that a pass of the model did not call, as was said.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    originals: dict[str, Any] = field(default_factory=dict)
    standing: dict[str, tuple[str, Piece]] = field(default_factory=dict)
    anchor: tuple[Parameter | None, torch.dtype] | None = None
    rounded: dict[Parameter, Parameter] | None = None
    axes: dict[Any, bool] = field(default_factory=dict)
    shown: set[Any] = field(default_factory=set)
    hooks: list[Any] = field(default_factory=list)
    frozen: list[Parameter] = field(default_factory=list)
    layouts: list[nn.Module] = field(default_factory=list)
    classes: Any = None
    labels: Any = None
    layout: Any = None
    stack: Any = None
    aside: Any = None
    opened: list[Any] = field(default_factory=list)
    watch: Any = None
    uncalled: set[str] = field(default_factory=set)

    def put(
        self, root: nn.Module, name: str, config: AdapterConfig, pieces: list[Piece], *, trainable: bool
    ) -> None:
        """Put an adapter's pieces on the model; it does not act yet."""
        self.configs[name], self.pieces[name] = config, pieces
        for piece in pieces:
            piece.put(root, self, name, trainable=trainable)
        self._placing.pop(name, None)

    def add(self, root: nn.Module, name: str, piece: Piece, *, trainable: bool) -> None:
        """Put one more piece of an adapter on the model, in the place of what it has under that path."""
        kept = [own for own in self.pieces[name] if type(own) is not type(piece) or own.path != piece.path]
        self.pieces[name] = [*kept, piece]
        piece.put(root, self, name, trainable=trainable)
        self._placing.pop(name, None)

    def off(self, root: nn.Module, name: str) -> None:
        """Take an adapter, which does not act, off the model."""
        for piece in reversed(self.pieces.pop(name)):
            piece.off(root, name)
        self._placing.pop(name, None)
        if self.classes is not None:
            self.classes.own.pop(name, None)
        del self.configs[name]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._placing: dict[str, list[Piece]] = {}

    def pieces_in(self, root: nn.Module, name: str) -> list[Piece]:
        """An adapter's pieces that are in the model still, by the paths that they have there now."""
        pieces = self.pieces[name]
        if all(piece.module is None or _stands(root, piece.path, piece.module) for piece in pieces):
            return list(pieces)
        paths = {place.module: place.path for place in walk(root)}
        return [piece for piece in pieces if piece.follow(paths)]

    def placing(self, name: str) -> list[Piece]:
        """The adapter's pieces that stand in the base's place, or let no other act beside them."""
        found = self._placing.get(name)
        if found is None:  # found once for all: most adapters have a hundred pieces, and none of these
            found = self._placing[name] = [piece for piece in self.pieces.get(name, ()) if piece.places]
        return found

    def known(self, name: str) -> str:
        """The name, if there is such an adapter.

        Raises:
            AdapterError: there is none; the message lists those there are.
        """
        if name not in self.configs:
            have = listing(map(repr, self.configs)) or "none"
            raise AdapterError(
                f"no adapter is named {name!r}{nearest(name, self.configs)}; the model has: {have}"
            )
        return name

    def one(self, name: str | None) -> str:
        """The named adapter; for None, the only one there is or the only one active.

        Raises:
            AdapterError: None was given and the choice is not clear.
        """
        if name is not None:
            return self.known(name)
        candidates = list(self.configs) if len(self.configs) == 1 else list(self.active)
        if len(candidates) != 1:
            raise AdapterError(
                f"which adapter? The model has {listing(map(repr, self.configs))}; give its name"
            )
        return candidates[0]

    def check_unmerged(self, doing: str) -> None:
        """Refuse what needs the base's own weights.

        Raises:
            StateError: adapters are merged.
        """
        if self.merged:
            names = listing(map(repr, self.merged))
            raise StateError(
                f"cannot {doing} while {names} is merged into the weights; call lorica.restore(model) first"
            )

    def activate(self, root: nn.Module, names: tuple[str, ...]) -> None:
        """Let exactly these adapters act.

        Raises:
            AdapterError: unknown name, or two of them bring their own version of one parameter.
        """
        names = tuple(dict.fromkeys(map(self.known, names)))
        taken: dict[str, Rows] = {}
        for name in names:
            own = [
                (path, rows, piece)
                for piece in self.placing(name)
                for path, rows in piece.claims(name).items()
            ]
            for path, rows, piece in own:
                if any(_overlap(path, other) and not _apart(rows, its) for other, its in taken.items()):
                    raise AdapterError(
                        f"{listing(map(repr, names))} cannot act together: {piece.clash.format(path)}"
                    )
            for path, rows, _ in own:
                before = taken.get(path)
                taken[path] = rows | before if rows is not None and before is not None else rows
        self._exchange(root, names)
        self.decide(self.last._replace(names=names, placed=self.placed))
        self.name_classes()

    def name_classes(self) -> None:
        """Have the model's configuration name the classes of the head that acts for the model."""
        if self.classes is not None:
            self.classes.follow(self.shared)

    def present(self, choice: Choice) -> Choice:
        """A choice without the adapters that are gone."""
        return choice._replace(names=tuple(name for name in choice.names if name in self.configs))

    def _exchange(self, root: nn.Module, names: tuple[str, ...]) -> None:
        """Have the parameters of these adapters stand in the base's place, and those of no others."""
        bringing = tuple(name for name in names if self.stand_ins(name))
        if {*bringing} == {*self.placed}:
            return
        self.check_placing(bringing)
        # Of what all of them have, one's own is other than the base's: that comes last, and stands.
        ordered = sorted(
            bringing, key=lambda name: any(p.optional and p.claims(name) for p in self.placing(name))
        )
        standing: dict[str, tuple[str, Piece]] = {}
        incoming: dict[str, Tensor] = {}
        for name in ordered:
            for piece in self.placing(name):
                for path, tensor in piece.stand_ins(name).items():
                    standing[path], incoming[path] = (name, piece), tensor
        self._check_devices(root, {**self.originals, **incoming})
        for path, original in self.originals.items():
            piece = self.standing[path][1]
            piece.left(put_at(root, path, original, self.dtype_now(original) if piece.master else None))
            _tell(root, path, None)
        self.originals = {
            path: put_at(root, path, tensor, tensor.dtype if standing[path][1].master else None)
            for path, tensor in incoming.items()
        }
        for path, original in self.originals.items():
            _tell(root, path, (standing[path][0], original))
        self.placed, self.standing = bringing, standing

    def dtype_now(self, original: Tensor) -> torch.dtype:
        """The dtype of a parameter of the base that was set aside, where the model moved to another since."""
        anchor, before = self.anchor or (None, None)
        return original.dtype if anchor is None or original.dtype != before else anchor.dtype

    def round(self, root: nn.Module, *, rounding: bool) -> None:
        """Have what stands in the base's place rounded to its dtype, or not; no adapter acts then."""
        self.activate(root, ())
        self.rounded = {} if rounding else None

    def _check_devices(self, root: nn.Module, coming: dict[str, Any]) -> None:
        """Refuse to exchange parameters for those of a model without values.

        Raises:
            StateError: naming one that was moved to the meta device.
        """
        for path, tensor in coming.items():
            owner, leaf = owner_of(root, path)
            if table_of(owner, leaf)[leaf].is_meta != tensor.is_meta:
                raise StateError(
                    f"{path} was moved to the meta device, without values (accelerate's offloading?), and an "
                    "adapter has its own in that place; bring it back first "
                    "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), or choose before"
                )

    def choose(self, names: tuple[str, ...]) -> None:
        """As `activate`, asked for by a layer, which does not know the model it is in.

        Raises:
            AdapterError: as `activate`.
            StateError: an adapter is merged, or one that comes or goes has parameters to be placed in the
                model.
        """
        names = tuple(dict.fromkeys(map(self.known, names)))
        if names == self.active:
            return
        self.check_unmerged("choose another adapter")
        placing = [name for name in {*names, *self.active} if self.stand_ins(name)]
        if placing:
            raise StateError(
                f"{listing(map(repr, sorted(placing)))} changes parameters of the base (a start taken out of "
                "it, or trained biases), so a layer alone cannot switch it; call set_adapter on the model, "
                "or lorica.active"
            )
        self.activate(_NOWHERE, names)

    @contextlib.contextmanager
    def originals_in_place(self, root: nn.Module) -> Iterator[None]:
        """Have the base's own parameters stand in the model for a while."""
        before = self.placed
        if before:
            self._exchange(root, ())
        try:
            yield
        finally:
            if before:
                self._exchange(root, tuple(name for name in before if name in self.configs))

    @contextlib.contextmanager
    def base_in_place(self, root: nn.Module) -> Iterator[None]:
        """Let no adapter act for a while, so that the base's own parameters stand in the model."""
        with self.originals_in_place(root), self.only_here(Choice()):
            yield

    def stand_ins(self, name: str) -> dict[str, Tensor]:
        """Name of a parameter or buffer in the base → what takes its place while the adapter acts."""
        return {
            path: tensor for piece in self.placing(name) for path, tensor in piece.stand_ins(name).items()
        }

    def starts_in(self, name: str) -> list[str]:
        """Names of the weights that an adapter's start was taken out of."""
        return [path for piece in self.placing(name) if piece.residual for path in piece.claims(name)]

    def whole(self, name: str) -> dict[str, Rows]:
        """Path → module that an adapter has a copy of, or rows of."""
        found: dict[str, Rows] = {}
        for piece in self.placing(name):
            if piece.section == "extras" and not piece.stand_ins(name):
                found |= piece.claims(name)
        return found

    def base_tensor(self, root: nn.Module, path: str) -> Tensor:
        """The base's own parameter or buffer of that name, whatever stands in its place."""
        if path in self.originals:
            return self.originals[path]
        owner, leaf = owner_of(root, path)
        return table_of(owner, leaf)[leaf]

    def base_parameter(self, root: nn.Module, path: str) -> Parameter:
        """The base's own parameter of that name, whatever stands in its place."""
        return self.originals[path] if path in self.originals else parameter_at(root, path)

    def parameters_of(self, name: str) -> Iterator[Parameter]:
        """All parameters that an adapter brought; each once."""
        found = (held.tensor for piece in self.pieces[name] for held in piece.tensors(name))
        yield from dict.fromkeys(tensor for tensor in found if isinstance(tensor, Parameter))

    def in_training(self) -> list[str]:
        """The adapters of which anything trains, in the order of arrival."""
        return [
            name
            for name in self.configs
            if any(parameter.requires_grad for parameter in self.parameters_of(name))
        ]


_NOWHERE = nn.Module()


def find_adapted(model: nn.Module) -> tuple[nn.Module, AdapterState] | None:
    """The adapted model in `model` and its state: itself, or what a wrapper such as DDP holds.

    Raises:
        StateError: it holds several, each adapted by itself.
    """
    found: dict[str, tuple[nn.Module, AdapterState]] = {}
    seen: set[nn.Module] = set()
    ahead = [("", model)]
    while ahead:
        path, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        state = module.__dict__.get(STATE)
        if state is not None:  # looking further inside would cost time at every call, and find nothing
            found[path] = module, state
            continue
        prefix = f"{path}." if path else ""
        ahead += [
            (prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None
        ]
    if len(found) > 1:
        raise StateError(
            f"{listing(found)} of this {type(model).__name__} were each adapted by themselves; call this on "
            "each of them, or adapt the whole model in their place"
        )
    return next(iter(found.values()), None)


def adapted(model: nn.Module) -> tuple[nn.Module, AdapterState]:
    """As `find_adapted`, where there must be one.

    Raises:
        StateError: the model carries no adapter, is only a part of the model that does, or holds several.
    """
    found = find_adapted(model)
    if found is not None:
        return found
    if any("adapter_state" in module.__dict__ for module in model.modules()):
        raise StateError(
            f"this {type(model).__name__} is a part of an adapted model; pass the whole model "
            "that was given to lorica.adapt"
        )
    raise StateError(
        f"this {type(model).__name__} carries no adapter; call lorica.adapt or lorica.load first"
    )


def check_name(name: str) -> str:
    """An adapter's name becomes part of parameter names and folder names; refuse what cannot be either.

    Raises:
        AdapterError: the name is empty, or holds a dot, a slash or another character that is not a letter,
            digit, ``_`` or ``-``.
    """
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "_-" for c in name):
        raise AdapterError(
            f"an adapter's name must be made of letters, digits, '_' and '-', not {name!r}; "
            "it becomes part of parameter and folder names"
        )
    if name in _RESERVED:
        raise AdapterError(
            f"{name!r} is an attribute of torch's ModuleDict or ParameterDict, which are keyed by adapter; "
            "choose another name"
        )
    return name


def _stands(root: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a module is still the one at a path; no, too, where that takes looking through a wrapper."""
    try:
        return root.get_submodule(path) is module
    except AttributeError:
        return False


def _tell(root: nn.Module, path: str, displaced: tuple[str, Parameter] | None) -> None:
    """Tell an adapted layer whose weight stands in W0's place, and what W0 is; None that W0 stands."""
    owner, leaf = owner_of(root, path)
    if "displaced" in owner.__dict__ and leaf == owner.weight_name:
        owner.__dict__["displaced"] = displaced


def _apart(rows: Rows, other: Rows) -> bool:
    """Whether two adapters train rows of a module that are none of them the same."""
    return rows is not None and other is not None and rows.isdisjoint(other)


def _overlap(path: str, other: str) -> bool:
    """Whether one path is the other, or inside it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")
