"""The state of an adapted model: its adapters by name, each a list of pieces, and those that act.

A model and all its adapted layers share one state, so choosing another adapter costs the same however many
layers or adapters there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import is_available, is_initialized
from torch.nn import Parameter

from lorica.choice import Choice, Choices
from lorica.config import AdapterConfig
from lorica.errors import AdapterError, StateError, listing, nearest
from lorica.piece import Piece, Rows
from lorica.tree import is_sharded, owner_of, parameter_at, put_at, tensor_at, walk

STATE = "lorica_state"
"""Attribute of the adapted model that holds its state."""
_RESERVED = frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))


@dataclass(eq=False)
class AdapterState(Choices):
    """State shared by an adapted model and its layers; `Choices` says which adapters act.

    Args:
        configs: adapter name → its configuration, in the order of arrival.
        pieces: adapter name → its pieces.
        originals: name → parameter or buffer of the base that an acting adapter has replaced.
        standing: the same names → the adapter and the piece that replaced it.
        anchor: a half-precision parameter of the base and the dtype it had at first; None without one. It
            shows whether the model has moved to another dtype since.
        rounded: float32 copies → their values rounded to the base's dtype, while merged; None otherwise.
        axes: kind of input → whether its first axis is the batch; found by mixtures.
        shown: the kinds of calls in which the model has run one row alone.
        hooks: hooks on the model and its parts, until `detach`.
        frozen: parameters that `adapt` froze and `detach` thaws.
        layouts: quantized layers that `adapt` keeps from repacking their weights, until `detach`.
        classes: class names of each head, where adapters bring heads of their own.
        labels: labels of the running call, where a prefix needs them.
        layout: position of a prefix in the running call.
        stack: how the list of blocks was exchanged (`layer_replication`), until `detach`.
        aside: what merging took off the model and `restore` puts back.
        opened: kinds of pieces that must undo something when the last adapter comes off.
        watch: the hook that looks for layers that a pass does not call.
        uncalled: kinds of layers already reported as not called.
        unfilled: adapters that came with values onto a model without any, which kept none.
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
    unfilled: set[str] = field(default_factory=set)

    def put(
        self, root: nn.Module, name: str, config: AdapterConfig, pieces: list[Piece], *, trainable: bool
    ) -> None:
        """Put an adapter's pieces on the model; it does not act yet."""
        self.configs[name], self.pieces[name] = config, pieces
        for piece in pieces:
            piece.put(root, self, name, trainable=trainable)
        self.found.clear()
        self.shown.clear()  # it may be on layers that no call was shown

    def add(self, root: nn.Module, name: str, piece: Piece, *, trainable: bool) -> None:
        """Put one more piece of an adapter on the model; it replaces the piece of that kind and path."""
        kept = [own for own in self.pieces[name] if type(own) is not type(piece) or own.path != piece.path]
        self.pieces[name] = [*kept, piece]
        piece.put(root, self, name, trainable=trainable)
        self.found.clear()

    def off(self, root: nn.Module, name: str) -> None:
        """Take an adapter off the model; it must not be acting."""
        for piece in reversed(self.pieces.pop(name)):
            piece.off(root, name)
        self.found.clear()
        if self.classes is not None:
            self.classes.own.pop(name, None)
        del self.configs[name]
        self.unfilled.discard(name)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found: dict[Any, list[Any]] = {}  # about adapters and layers, until an adapter comes or goes

    def pieces_in(self, root: nn.Module, name: str) -> list[Piece]:
        """The adapter's pieces that are still in the model, with their present paths."""
        pieces = self.pieces[name]
        if all(piece.module is None or _stands(root, piece.path, piece.module) for piece in pieces):
            return list(pieces)
        paths = {place.module: place.path for place in walk(root)}
        return [piece for piece in pieces if piece.follow(paths)]

    def placing(self, name: str) -> list[Piece]:
        """The adapter's pieces that replace something of the base, or exclude other adapters' pieces."""
        found = self.found.get(name)
        if found is None:  # kept: most adapters have a hundred pieces, and none of these
            found = self.found[name] = [piece for piece in self.pieces.get(name, ()) if piece.places]
        return found

    def known(self, name: str) -> str:
        """The name itself, if an adapter has it.

        Raises:
            AdapterError: no adapter has it; the message lists the names there are.
        """
        if not isinstance(name, str) or name not in self.configs:
            have = listing(map(repr, self.configs)) or "none"
            raise AdapterError(
                f"no adapter is named {name!r:.80}{nearest(name, self.configs)}; the model has: {have}"
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
        """Refuse an operation that needs the base's own weights while adapters are merged.

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
                if any(_overlap(path, other) and not _disjoint(rows, its) for other, its in taken.items()):
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
        """Write the acting head's class names into the model's configuration."""
        if self.classes is not None:
            self.classes.follow(self.shared)

    def present(self, choice: Choice) -> Choice:
        """The choice without adapters that have been detached."""
        return choice._replace(names=tuple(name for name in choice.names if name in self.configs))

    def _exchange(self, root: nn.Module, names: tuple[str, ...]) -> None:
        """Replace parameters of the base by those of these adapters, and put all others back."""
        bringing = tuple(name for name in names if self.stand_ins(name))
        if {*bringing} == {*self.placed}:
            return
        self.check_placing(bringing)
        self._check_whole(root)
        # Where several adapters have one parameter, an optional piece's values are the ones that differ from
        # the base's: its adapter comes last and wins.
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

    def _check_whole(self, root: nn.Module) -> None:
        """Refuse to exchange parameters for those of a model that was sharded since.

        Raises:
            StateError: naming one of which each rank holds a part.
        """
        split = next((path for path in self.originals if is_sharded(tensor_at(root, path))), None)
        if split is not None:
            raise StateError(
                f"{split} is an adapter's own, which stands in the base's place and was sharded there "
                "(fully_shard, tensor parallel), so it cannot be exchanged for the base's; choose which acts "
                "before sharding"
            )

    def dtype_now(self, original: Tensor) -> torch.dtype:
        """The dtype that a parameter set aside must have now, for the model may have moved to another."""
        anchor, before = self.anchor or (None, None)
        return original.dtype if anchor is None or original.dtype != before else anchor.dtype

    def round(self, root: nn.Module, *, rounding: bool) -> None:
        """Round float32 replacements to the base's dtype, or stop doing so; afterwards no adapter acts."""
        self.activate(root, ())
        self.rounded = {} if rounding else None

    def _check_devices(self, root: nn.Module, coming: dict[str, Any]) -> None:
        """Refuse to exchange parameters of which one side has no values (the meta device).

        Raises:
            StateError: naming one that was moved to the meta device.
        """
        for path, tensor in coming.items():
            if tensor_at(root, path).is_meta != tensor.is_meta:
                raise StateError(
                    f"{path} was moved to the meta device, without values (accelerate's offloading?), and an "
                    "adapter replaces it; bring it back first "
                    "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), or choose the adapter "
                    "before it is moved"
                )

    @contextlib.contextmanager
    def originals_in_place(self, root: nn.Module) -> Iterator[None]:
        """Put the base's own parameters back into the model for the length of a block."""
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
        """Let no adapter act for the length of a block, with the base's own parameters in the model."""
        with self.originals_in_place(root), self.only_here(Choice()):
            yield

    def stand_ins(self, name: str) -> dict[str, Tensor]:
        """Name of a parameter or buffer of the base → its replacement while the adapter acts."""
        return {
            path: tensor for piece in self.placing(name) for path, tensor in piece.stand_ins(name).items()
        }

    def starts_in(self, name: str) -> list[str]:
        """Names of the weights from which the adapter's start was subtracted."""
        return [path for piece in self.placing(name) if piece.residual for path in piece.claims(name)]

    def whole(self, name: str) -> dict[str, Rows]:
        """Path of each module that the adapter copies, in whole or in rows → those rows."""
        found: dict[str, Rows] = {}
        for piece in self.placing(name):
            if piece.section == "extras" and not piece.stand_ins(name):
                found |= piece.claims(name)
        return found

    def base_tensor(self, root: nn.Module, path: str) -> Tensor:
        """The base's own parameter or buffer of that name, even while an adapter replaces it."""
        return self.originals[path] if path in self.originals else tensor_at(root, path)

    def base_parameter(self, root: nn.Module, path: str) -> Parameter:
        """The base's own parameter of that name, even while an adapter replaces it."""
        return self.originals[path] if path in self.originals else parameter_at(root, path)

    def parameters_of(self, name: str) -> Iterator[Parameter]:
        """All parameters of an adapter, each once."""
        found = (held.tensor for piece in self.pieces[name] for held in piece.tensors(name))
        yield from dict.fromkeys(tensor for tensor in found if isinstance(tensor, Parameter))

    def in_training(self) -> list[str]:
        """The adapters with at least one parameter that trains, in the order of arrival."""
        return [
            name
            for name in self.configs
            if any(parameter.requires_grad for parameter in self.parameters_of(name))
        ]


def find_adapted(model: nn.Module) -> tuple[nn.Module, AdapterState] | None:
    """The adapted model and its state: `model` itself, or the one inside a wrapper such as DDP.

    Raises:
        StateError: it holds several models, each adapted by itself.
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
        if state is not None:  # nothing inside can be adapted by itself, and a walk would cost every call
            found[path] = module, state
            continue
        prefix = f"{path}." if path else ""
        ahead += [
            (prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None
        ]
    if len(found) > 1:
        raise StateError(
            f"{listing(found)} of this {type(model).__name__} were each adapted by themselves; call this on "
            "each of them, or adapt the whole model instead"
        )
    return next(iter(found.values()), None)


def adapted(model: nn.Module) -> tuple[nn.Module, AdapterState]:
    """As `find_adapted`, but an adapted model must be there.

    Raises:
        StateError: the model carries no adapter, is only a part of an adapted model, or holds several.
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


def in_group() -> bool:
    """Whether this process is one of several: only then can a tensor be one rank's part."""
    return is_available() and is_initialized()


def check_name(name: str) -> str:
    """Refuse a name that cannot be part of parameter names and folder names.

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
    """Whether the path leads to this module; False too where only a look through a wrapper would show it."""
    try:
        return root.get_submodule(path) is module
    except AttributeError:
        return False


def _tell(root: nn.Module, path: str, displaced: tuple[str, Parameter] | None) -> None:
    """Tell an adapted layer which adapter replaced W0, and W0 itself; None says that W0 is back."""
    owner, leaf = owner_of(root, path)
    if "displaced" in owner.__dict__ and leaf == owner.weight_name:
        owner.__dict__["displaced"] = displaced


def _disjoint(rows: Rows, other: Rows) -> bool:
    """Whether two adapters train rows of a module, and none in common."""
    return rows is not None and other is not None and rows.isdisjoint(other)


def _overlap(path: str, other: str) -> bool:
    """Whether the paths are equal, or one is inside the other."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")
