"""The rest of W0 beside a start: it replaces W0 while the adapter acts (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).

    W0 ──▶ (W0 − scale·B₀·A₀) + scale·B·A

W0 itself is set aside and never written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from lorica import inits
from lorica.config import LoraConfig, changes_base
from lorica.config.inits import niter
from lorica.errors import AdapterError
from lorica.find import Target
from lorica.inits import generator
from lorica.piece import Beginning, Held, Piece, Rows
from lorica.pieces import Kind, Search, register
from lorica.pieces.low_rank import LowRank
from lorica.state import AdapterState
from lorica.tree import assign, is_sharded, whole


class Remainder(Piece):
    """The residual of one layer's W0; it trains nothing, and files hold nothing of it.

    Args:
        update: the piece whose start was subtracted.
        start: that start, and the residual.
    """

    places = True
    residual = True
    clash = "each took its start out of {}; extract one and attach it again, and it stands beside W0 itself"

    def __init__(self, update: LowRank, start: inits.Residual) -> None:
        super().__init__(update.path)
        self.update, self.start = update, start

    def follow(self, paths: Mapping[nn.Module, str]) -> bool:  # noqa: D102
        found = self.update.follow(paths)
        self.path = self.update.path
        return found

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:
        """Nothing to put: it replaces W0 once its adapter acts."""

    def off(self, root: nn.Module, name: str) -> None:
        """Nothing to undo: an adapter that does not act replaces nothing."""

    def tensors(self, name: str) -> Iterator[Held]:  # noqa: D102
        return iter(())

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: D102
        return iter(())

    def stand_ins(self, name: str) -> Mapping[str, Tensor]:  # noqa: D102
        return {self.update.target.weight_path: self.start.weight}

    def claims(self, name: str) -> Mapping[str, Rows]:  # noqa: D102
        return {self.update.target.weight_path: None}

    def restart(self, root: nn.Module, state: AdapterState, name: str, A: Tensor, B: Tensor) -> None:
        """Use a saved start: a decomposition computed anew may differ on another machine.

        Args:
            root: the model.
            state: the model's state.
            name: the adapter's name.
            A: (r, d_in).
            B: (d_out, r).
        """
        start, target = self.start, self.update.target
        assert start.A is not None
        assert start.B is not None
        start.A.copy_(A)
        start.B.copy_(B)
        W0 = whole(state.base_parameter(root, target.weight_path))
        rest = inits.subtract(target.layer, W0, start.A, start.B, self.update.scale(name))
        rest = (rest.t() if target.layer.transposed else rest).to(start.weight.dtype)
        stands = target.module._parameters[target.layer.weight_name]
        # What the model was sharded with is its own, and no more the start's.
        for weight in (start.weight, stands) if is_sharded(stands) else (start.weight,):
            assert weight is not None
            assign(weight, rest)


class Remainders(Kind):
    """Finds what the starts of the other pieces leave of W0."""

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        return ()

    def finish(self, search: Search) -> None:  # noqa: D102
        search.pieces += [
            Remainder(piece, piece.start) for piece in search.of(LowRank) if piece.start is not None
        ]

    def filled(self, search: Search) -> None:
        """Subtract the starts of a trained adapter from W0 again."""
        for piece in search.of(LowRank):
            start = None
            if piece.path in search.starts:
                start = inits.residual_of(piece.target, *search.starts[piece.path], piece.begun.scale)
            elif isinstance(search.config, LoraConfig) and changes_base(search.config.init_lora_weights):
                start = _computed(search, search.config, piece.target)
            if start is not None:
                search.pieces.append(Remainder(piece, start))


def _computed(search: Search, config: LoraConfig, target: Target) -> inits.Residual | None:
    """Compute a trained adapter's start from W0, for factors that were saved without it.

    Raises:
        AdapterError: the start was drawn at random, so it cannot be computed.
        TargetError: as `Init.initialize`.
        StateError: as `Init.initialize`.
    """
    value = config.init_lora_weights
    if niter(value) is not None:
        raise AdapterError(
            f"the adapter was trained with init_lora_weights={value!r} and saved without its start, and "
            "that was drawn at random, so it cannot be computed again. Save it where it was trained: "
            "with lorica.save, or with PEFT's path_initial_model_for_weight_conversion"
        )
    seen, random = search.seen.get(target.path), generator(0, target.path)
    return inits.of(config).initialize(target, config, seen, random).start


register(Remainders(), "residual")
