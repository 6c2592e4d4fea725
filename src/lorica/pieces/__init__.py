"""The contents of adapters, and the search for their pieces on a model.

    config (and a file's tensors) ──▶ each kind it asks for ──▶ [piece, piece, ...] ──put──▶ model

A `Piece` is one thing at one place; a `Kind` finds the pieces of its sort. The verbs that adapt, load, save,
merge and detach name no kind.

low_rank    A and B on a layer                      plugins/parameters  on a parameter (stacked experts)
whole       a copy of a module                      plugins/tied        one update for two tied tables
copies      a copy of a parameter (biases)          plugins/tokens      rows of an embedding
                                                    plugins/added       parts beside a module
                                                    plugins/replicated  blocks that share their weights
                                                    plugins/statistics  running statistics (batch norm)
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.adapter import Adapter
from lorica.config import AdapterConfig, LoraConfig
from lorica.errors import AdapterError, lines, nearest
from lorica.piece import Piece
from lorica.state import AdapterState
from lorica.tree import Place, assign, base_parameters, outside, walk


class Search:
    """The search for an adapter's pieces on a model.

    Args:
        root: the model, with the base's own parameters in place.
        config: what to look for.
        state: the model's state, if it carries adapters.
        adapter: the adapter to load; None for a new one.
        seed: fixes how new pieces start.
        trainable: whether the adapter will train.
        seen: path → what data showed of the module, for the inits that look at data.
        starts: path → A₀ and B₀ that the loaded adapter subtracted from W0.
        dry: only look: new tensors have shapes and no values.

    Attributes:
        lora: the LoRA among the configuration's methods, if there is one.
        methods: its other methods.
        itself: the model's own place.
        places: the place of every module in it.
        pieces: the pieces found so far.
        whole: path → module that is trained whole.
        changes: field of the LoRA → value that the search settled.
        problems: what does not fit in the loaded adapter, one line each.
        missing: what the configuration names and the adapter lacks.
        passed_over: keys of the adapter's tensors that need no place.
        trained: names of the base's parameters that methods besides LoRA train copies of.
    """

    def __init__(
        self,
        root: nn.Module,
        config: AdapterConfig,
        *,
        state: AdapterState | None = None,
        adapter: Adapter | None = None,
        seed: int = 0,
        trainable: bool = True,
        seen: Mapping[str, Any] | None = None,
        starts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        dry: bool = False,
    ) -> None:
        self.state = state
        self.root, self.seed, self.trainable, self.dry = root, seed, trainable, dry
        self.seen, self.starts = seen or {}, starts or {}
        self.adapter: Adapter | None = None
        self.take(config, adapter)
        self.itself, *self.places = walk(root)
        self.pieces: list[Piece] = []
        self.whole: dict[str, nn.Module] = {}
        self.changes: dict[str, Any] = {}
        self.problems: list[str] = []
        self.missing: list[str] = []
        self.passed_over: set[str] = set()
        self.trained: list[str] = []

    def take(self, config: AdapterConfig, adapter: Adapter | None = None) -> None:
        """Look for this configuration, and load this adapter."""
        self.config, self.adapter = config, adapter
        self.lora, self.methods = config.members()
        self.asks = {key for part in (config, self.lora, *self.methods) if part for key in part.asks()}
        if self.starts:
            self.asks.add("residual")

    def reject(self, path: str, problem: str) -> None:
        """Record a problem with the adapter's factors of one module."""
        self.problems.append(problem)
        self.passed_over |= {f"{path} ({part})" for part in ("A", "B", "magnitude", "bias")}

    @property
    def free(self) -> list[Place]:
        """The places outside the modules that are trained whole."""
        return outside(self.places, self.whole)

    @property
    def targets(self) -> list[Any]:
        """The modules and parameters with a low-rank update (`lorica.find.Target`)."""
        return [target for piece in self.pieces if (target := getattr(piece, "target", None)) is not None]

    def of(self, kind: type[Piece]) -> list[Any]:
        """The pieces of one class found so far."""
        return [piece for piece in self.pieces if isinstance(piece, kind)]

    def rename(self, lora: LoraConfig) -> None:
        """Search by a more exact LoRA from here on."""
        self.lora = lora
        self.asks |= lora.asks()

    def settled(self) -> AdapterConfig:
        """The configuration as a file should hold it, so that every reader finds the same pieces."""
        base = getattr(self.root, "name_or_path", None) or self.config.base_model_name_or_path or None
        lora = self.lora.as_found(**self.changes, base_model_name_or_path=base) if self.lora else None
        if lora is not None and not self.methods:
            return lora
        heads = sorted({path.rpartition(".")[2] for path in self.whole})
        changes: dict[str, Any] = {
            "modules_to_save": list(dict.fromkeys([*(self.config.modules_to_save or []), *heads])) or None,
            "base_model_name_or_path": base,
        }
        parts: tuple[AdapterConfig, ...] = self.config.parts()
        if self.config not in parts:
            changes["configs"] = tuple(
                lora.replace(modules_to_save=part.modules_to_save, task_type=part.task_type)
                if isinstance(part, LoraConfig) and lora
                else dataclasses.replace(part, base_model_name_or_path=base)
                for part in parts
            )
        return self.config.replace(**changes)


class Kind(ABC):
    """Finds the pieces of one sort on a model.

    A kind is asked where a field of the configuration, the model or the loaded adapter calls for it.

    Attributes:
        of_modules: classes of modules whose presence in the model calls for it.
        of_transformers: whether every model with a configuration of transformers calls for it.
        brought: section of an `Adapter` that calls for it when it is not empty.
        keys: fields and methods of a configuration that call for it (`register`).
    """

    of_modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    of_transformers: ClassVar[bool] = False
    brought: ClassVar[str | None] = None
    keys: tuple[str, ...] = ()

    def prepare(self, search: Search) -> None:
        """Make the configuration more exact (`Search.rename`) before any kind looks."""
        return

    @abstractmethod
    def find(self, search: Search) -> Iterable[Piece]:
        """The pieces, with their tensors as they start; the model is not touched.

        Raises:
            TargetError: a name matches nothing, or something that cannot be adapted this way.
        """

    def finish(self, search: Search) -> None:
        """Check or change the pieces after all kinds have looked.

        Raises:
            TargetError: two pieces exclude each other.
        """
        return

    def filled(self, search: Search) -> None:
        """Do what needs the loaded adapter's values."""
        return

    def opened(self, root: nn.Module, state: AdapterState) -> None:
        """Prepare the model for such pieces, at its first adapter."""
        return

    def closed(self, root: nn.Module, state: AdapterState) -> None:
        """Undo `opened`, after the last adapter has come off."""
        return

    def around(
        self, root: nn.Module, state: AdapterState, config: AdapterConfig
    ) -> AbstractContextManager[None]:
        """A context for finding the adapter's pieces and putting them on; an error undoes it."""
        return contextlib.nullcontext()


KINDS: list[Kind] = []
"""All kinds, in the order in which they look."""


def register(kind: Kind, *keys: str) -> Kind:
    """Make a kind of piece known.

    Args:
        kind: it looks after those that are known already.
        keys: fields of a configuration, or names of methods, that call for it; every LoRA calls for
            ``"lora"``.
    """
    kind.keys = keys
    KINDS.append(kind)
    return kind


def asked(search: Search) -> Iterator[Kind]:
    """The kinds that the configuration, the model or the loaded adapter calls for."""
    for kind in KINDS:
        if (
            not search.asks.isdisjoint(kind.keys)
            or (kind.of_transformers and hasattr(search.root, "config"))
            or (kind.brought and search.adapter is not None and getattr(search.adapter, kind.brought))
            or (kind.of_modules and any(isinstance(place.module, kind.of_modules) for place in search.places))
        ):
            yield kind


@contextlib.contextmanager
def surroundings(root: nn.Module, state: AdapterState, config: AdapterConfig) -> Iterator[None]:
    """The contexts that the kinds need around finding pieces and putting them on (`Kind.around`)."""
    keys = {key for part in (config, *config.parts()) for key in part.asks()}
    with contextlib.ExitStack() as stack:
        for kind in KINDS:
            concerned = not keys.isdisjoint(kind.keys) or type(kind) in map(type, state.opened)
            if concerned and type(kind).around is not Kind.around:
                stack.enter_context(kind.around(root, state, config))
        yield


@contextlib.contextmanager
def looking(root: nn.Module, state: AdapterState, config: AdapterConfig) -> Iterator[None]:
    """As `surroundings`, for a search that puts nothing on and leaves the model as it was."""
    with surroundings(root, state, config), state.originals_in_place(root):
        try:
            yield
        finally:
            for kind in KINDS if not state.configs else ():
                kind.closed(root, state)


def find_pieces(search: Search) -> list[Piece]:
    """Find all pieces of an adapter.

    Raises:
        TargetError: a name or pattern matches nothing, or something that cannot be adapted.
        AdapterError: the loaded adapter does not fit; the message lists every problem.
    """
    for kind in asked(search):
        kind.prepare(search)
    kinds = list(asked(search))
    for kind in kinds:
        search.pieces += kind.find(search)
    for kind in kinds:
        kind.finish(search)
    if search.adapter is not None:
        fit(search)
    return search.pieces


def resolve(root: nn.Module, config: AdapterConfig, *, state: AdapterState | None = None) -> Search:
    """Search for a configuration's pieces on a model without making any.

    Args:
        root: the model.
        config: what to look for.
        state: the model's state, if it carries adapters.

    Returns:
        The search, with its `pieces`, `targets`, `whole` and `settled()`.

    Raises:
        TargetError: a name or pattern matches nothing, or something that cannot be adapted.
    """
    search = Search(root, config, state=state, dry=True)
    find_pieces(search)
    return search


def fit(search: Search) -> None:
    """Fill the pieces with the loaded adapter's tensors.

    Raises:
        AdapterError: lists what is missing, unexpected or of another shape.
    """
    assert search.adapter is not None
    given = search.adapter.named_tensors()
    missing, unexpected, shapes = misfits(search.pieces, "", given, "in the model", search.passed_over)
    have = base_parameters(search.root) if unexpected else {}
    strange = {
        key: f"unexpected: {key} is not a parameter of the model{nearest(key, have, limit=1)}"
        for key in unexpected
    }
    odd = [problem for key in given for problem in (shapes.get(key), strange.get(key)) if problem]
    problems = [*search.problems, *odd, *(f"missing: {key}" for key in [*missing, *search.missing])]
    if problems:
        raise AdapterError(f"the adapter does not fit this {type(search.root).__name__}:\n{lines(problems)}")
    fill(search.pieces, "", given)
    for kind in asked(search):
        kind.filled(search)


def misfits(
    pieces: Sequence[Piece],
    name: str,
    given: Mapping[str, Tensor],
    where: str,
    passed_over: Collection[str] = (),
) -> tuple[list[str], list[str], dict[str, str]]:
    """Compare an adapter's tensors with the pieces that are to hold them.

    Args:
        pieces: the pieces.
        name: the name of their adapter.
        given: key → tensor.
        where: the words for the pieces' side in a message.
        passed_over: keys that need no place.

    Returns:
        The missing keys, the unexpected keys, and key → message for each wrong shape.
    """
    expected: dict[str, Tensor] = {}
    needed: list[str] = []
    for piece in sorted(pieces, key=lambda piece: piece.section != "factors"):
        held = {held.key: held.tensor for held in piece.tensors(name)}
        expected |= held
        needed += () if piece.optional else held
    shapes = {
        key: f"shape of {key}: {tuple(given[key].shape)} in the adapter, {tuple(tensor.shape)} {where}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    }
    missing = [key for key in dict.fromkeys(needed) if key not in given]
    return missing, [key for key in given if key not in expected and key not in passed_over], shapes


@torch.no_grad()
def fill(pieces: Sequence[Piece], name: str, given: Mapping[str, Tensor]) -> None:
    """Copy an adapter's tensors, which fit, into the pieces."""
    for piece in pieces:
        for held in piece.tensors(name):
            assign(held.tensor, given[held.key] if held.key in given else piece.otherwise(held))


# The kinds register themselves: those that find modules before those that look at what was found.
# isort: off
from lorica.pieces import whole as whole  # noqa: E402
from lorica.pieces import low_rank as low_rank  # noqa: E402
from lorica.pieces import plugins as plugins  # noqa: E402
from lorica.pieces import copies as copies  # noqa: E402
