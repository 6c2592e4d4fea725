"""Adapters side by side on a model that stays as it is: mounted into slots, one for each token of a batch.

    adapter ──fit──▶ Fitted ──mount──▶ Place ──choose──▶ acts on its tokens

`lorica.mixed` has an adapter for each row of a batch, of adapters that the model carries. Slots are for
serving: the model keeps its classes and names, a batch is one packed row of many requests' tokens, and
hundreds of adapters come and go. Fitting may run in any thread; mounting is a copy, and belongs between two
passes of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapter import Adapter
from lorica.config import method_of
from lorica.errors import AdapterError, LoricaError, StateError
from lorica.layers import LoraEmbedding, LoraLayer, LoraLinear, LoraOpaque, LoraQuantized
from lorica.layers.quantized import REPACKS, hold_layout, release_layout
from lorica.layers.slots import Chosen, Packed, Part, Place, Plan, Run, SlotLayer
from lorica.layers.slots.layer import OtherRows
from lorica.model.mixed import is_expert
from lorica.piece import Piece
from lorica.pieces import Search, find_pieces
from lorica.pieces.copies import ParameterCopy
from lorica.pieces.low_rank import LowRank
from lorica.pieces.plugins.tokens import TokenRows
from lorica.pieces.whole import WholeCopy
from lorica.state import adapted, find_adapted
from lorica.tree import base_parameters, module_at, output_head, unwrapped

RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Ranks of the buckets: an adapter's factors are filled up to the next of them."""
_PER_TOKEN = (nn.Linear, nn.Embedding, nn.LayerNorm)


@dataclass(frozen=True, eq=False)
class Fitted:
    """An adapter made ready for a model: cast, scaled, and known to fit.

    Args:
        parts: path → what it does there.
        modules: path → module.
        rank: the largest of its updates'; 0 where it has none.
        total: modules that the adapter has something for.
    """

    parts: Mapping[str, Part]
    modules: Mapping[str, nn.Module]
    rank: int
    total: int

    @property
    def applied(self) -> int:
        """Modules that it acts on."""
        return len(self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts.values())


class Slots:
    """Room for adapters side by side on one model, whose classes and names stay as they are.

    LoRA's updates of linear layers and embeddings, with DoRA and biases on B; trained biases; trained rows of
    the vocabulary; and whole copies of heads, embeddings and norms. Whatever else an adapter may hold cannot
    differ by token, and `fit` refuses it by name.

    Args:
        model: the base; it may carry adapters of its own, none of which acts beside those in slots.
        capacity: adapters that can be mounted together.
        max_rank: a larger rank is refused.

    Raises:
        StateError: adapters are merged into the model's weights.
    """

    def __init__(self, model: nn.Module, capacity: int = 32, *, max_rank: int = 64) -> None:
        found = find_adapted(model)
        self.root = unwrapped(model) if found is None else found[0]
        if found is not None:
            found[1].check_unmerged("mount adapters")
        if capacity < 1:
            raise StateError(f"capacity should be 1 or more, not {capacity}: each adapter takes a slot")
        self.capacity, self.max_rank = capacity, max_rank
        self.mounted: dict[Place, Fitted] = {}
        self._layers: dict[nn.Module, SlotLayer] = {}
        self._chosen = Chosen()
        self._head = output_head(self.root)
        # An evaluation would repack them, with a loss, and adapters act beside the weights as they were.
        self._layouts = [module for module in self.root.modules() if module.__dict__.get(REPACKS)]
        hold_layout(self._layouts)

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return len(self.mounted) >= self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the tables of all layers."""
        return sum(table.nbytes for layer in self._layers.values() for table in layer.tables.values())

    @torch.no_grad()
    def fit(self, adapter: Adapter) -> Fitted:
        """Make an adapter ready to be mounted; the model is not touched.

        Args:
            adapter: as `lorica.read` or `lorica.extract` gives it.

        Raises:
            AdapterError: it does not fit the model, with the whole list; it acts on nothing; its rank is over
                the ceiling; or it holds what cannot differ by token.
        """
        if adapter.config.asks() & {"layer_replication"}:
            raise AdapterError("an adapter with replicated blocks changes the model, one for all tokens")
        found = find_adapted(self.root)
        state = None if found is None else found[1]
        search = Search(self.root, adapter.config, state=state, adapter=adapter, trainable=False)
        try:
            pieces = find_pieces(search)
        except AdapterError:
            raise
        except LoricaError as error:
            raise AdapterError(str(error)) from error
        parts: dict[str, dict[str, Any]] = {}
        modules: dict[str, nn.Module] = {}
        for piece in pieces:
            for path, module, fields in self._parts(piece, adapter):
                modules[path] = module
                parts.setdefault(path, {}).update(fields)
        if not parts:
            raise AdapterError("the adapter acts on no module of the model")
        rank = max((factors.r for factors in adapter.factors.values()), default=0)
        if rank > self.max_rank:
            raise AdapterError(
                f"its rank is {rank}, and at most {self.max_rank} is served; raise max_rank, or lower the "
                "adapter's: lorica.algebra.compress"
            )
        fitted = {path: Part(**fields) for path, fields in parts.items()}
        for path, part in fitted.items():
            if not part.finite:
                dtype = _like(modules[path], self.root).dtype
                raise AdapterError(f"its update of {path} is not finite in {dtype}, as the model computes")
        return Fitted(fitted, modules, rank, len(parts))

    def mount(self, fitted: Fitted) -> Place:
        """Copy an adapter into a free slot.

        Raises:
            StateError: none is free.
        """
        if self.full:
            raise StateError(f"all {self.capacity} slots are taken; unmount an adapter first")
        rank = next((rank for rank in RANKS if rank >= fitted.rank), fitted.rank)
        taken = {place.row for place in self.mounted if place.rank == rank}
        place = Place(rank, next(row for row in range(self.capacity) if row not in taken))
        parts = {fitted.modules[path]: (path, part) for path, part in fitted.parts.items()}
        try:
            for module, (path, part) in parts.items():
                if module not in self._layers:
                    head = module is self._head
                    like = _like(module, self.root)
                    self._layers[module] = SlotLayer(path, module, self._chosen, head, like)
                self._layers[module].put(place, part)
            for module, layer in self._layers.items():
                if module not in parts:
                    layer.clear(place)
        except BaseException:  # no memory for larger tables, as a rule
            for layer in self._layers.values():
                layer.drop(place)
            raise
        self.mounted[place] = fitted
        return place

    def unmount(self, place: Place) -> None:
        """Free a slot; no token may be its in a pass that runs."""
        fitted = self.mounted.pop(place)
        for module in fitted.modules.values():
            self._layers[module].drop(place)

    def choose(self, runs: Iterable[Run], heads: Iterable[Run] | None = None) -> None:
        """Say what acts in this thread's next passes of the model, whose batch is one packed row.

        Args:
            runs: place (None for the base) and number of its tokens, one after the other.
            heads: the same for what the output head is given, where that is not every token
                (``logits_to_keep``).
        """
        runs, heads = tuple(runs), None if heads is None else tuple(heads)
        before = self._chosen.packed
        if before is not None and before.runs == (runs, heads):
            return
        device = next(self.root.parameters()).device
        self._chosen.packed = Packed(Plan(runs, device), None if heads is None else Plan(heads, device))

    def rest(self) -> None:
        """Have no mounted adapter act in this thread."""
        self._chosen.packed = None

    def close(self) -> None:
        """Take everything off the model."""
        for layer in self._layers.values():
            layer.close()
        self._layers.clear()
        self.mounted.clear()
        release_layout(self._layouts)
        self._layouts = []

    def _parts(self, piece: Piece, adapter: Adapter) -> Iterable[tuple[str, nn.Module, dict[str, Any]]]:
        if isinstance(piece, LowRank) and piece.target.parameter is None:
            yield piece.path, piece.target.module, self._factors(piece)
        elif isinstance(piece, WholeCopy):
            module, twin = piece.module, piece.twin
            if not (isinstance(module, _PER_TOKEN) or type(module).__name__.endswith(("Norm", "Conv1D"))):
                raise AdapterError(
                    f"{piece.path} ({type(module).__name__}) is trained whole, and may look at more than "
                    "one token; only heads, embeddings and norms can differ by token"
                )
            like = _like(module, self.root)
            yield piece.path, module, {"copy": twin.to(like.dtype).eval().requires_grad_(False)}
        elif isinstance(piece, ParameterCopy) and piece.path.endswith(".bias"):
            path = piece.path.rpartition(".")[0]
            module = module_at(self.root, path)
            if not (isinstance(module, nn.Linear | nn.LayerNorm) or type(module).__name__ == "Conv1D"):
                raise AdapterError(
                    f"{piece.path} of a {type(module).__name__} is trained, and may be more than added to "
                    "its output; one for all tokens"
                )
            base, like = base_parameters(self.root)[piece.path], _like(module, self.root)
            yield path, module, {"shift": (piece.parameter.float() - base.float()).to(like)}
        elif isinstance(piece, TokenRows):
            for path, module in piece.modules.items():
                rows = piece.rows.detach().to(_like(module, self.root))
                yield path, module, {"copy": OtherRows(module, piece.indices, rows)}
        else:
            raise AdapterError(
                f"{piece.path or 'the model'}: what {method_of(adapter.config)} changes there is one for all "
                "tokens, and cannot be served beside other adapters; merge it into a base of its own "
                "(lorica merge)"
            )

    def _factors(self, piece: LowRank) -> dict[str, Any]:
        layer, module, own = piece.target.layer, piece.target.module, piece.begun
        assert own is not None
        # Not where an update is folded into a weight that others read, nor among experts.
        kind = (LoraLinear, LoraEmbedding, LoraOpaque, LoraQuantized)
        if not (issubclass(layer, kind) and layer.rows_differ) or piece.variant is not None:
            what = "is read past its layer, as one weight for all tokens"
            what = what if piece.variant is None else f"has a variant of its own ({piece.variant.name})"
            raise AdapterError(f"{piece.path} {what}; adapters on it cannot be mixed in a batch")
        if is_expert(piece.path):
            raise AdapterError(
                f"{piece.path} is an expert, which sees some of the tokens; adapters on it cannot be mixed "
                "in a batch"
            )
        like = _like(module, self.root)
        scale = own.scale * float(getattr(module, "embed_scale", 1.0) if own.kind == "embedding" else 1.0)
        A, B, turn = own.A, own.B.t() * scale, None
        if own.magnitude is not None:
            weight = None
            if isinstance(module, LoraLayer):  # an adapter's own may stand in its place
                weight = adapted(self.root)[1].base_tensor(
                    self.root, f"{piece.target.path}.{layer.weight_name}"
                )
            ratio = own.magnitude / layer.row_norm(module, own.A, own.B, own.scale, weight)
            B, turn = B * ratio, (ratio - 1).to(like)
        fields: dict[str, Any] = {"A": A.to(like), "B": B.to(like).contiguous()}
        if turn is not None:
            fields["turn"] = turn
        if own.bias is not None:
            fields["shift"] = (own.bias * own.scale).to(like)
        return fields


def _like(module: nn.Module, root: nn.Module) -> Tensor:
    """An empty tensor with the dtype and device that a module computes in."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.itemsize < 2:
        weight = next(p for p in root.parameters() if p.is_floating_point() and p.itemsize > 1)
    return weight.new_empty(0)
