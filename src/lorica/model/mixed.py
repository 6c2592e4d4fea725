"""One adapter for each row of a batch."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from torch import nn

from lorica.choice import names_in
from lorica.config import method_of
from lorica.errors import AdapterError, StateError, listing
from lorica.layers import LoraLayer, SavedModule, read_by
from lorica.layers.rows import Axes, Rows
from lorica.model.activate import active
from lorica.model.watch.alone import watch_calls
from lorica.state import AdapterState, adapted
from lorica.tree import walk


class mixed:
    """Let each row of the batch have an adapter of its own, or none; the base runs once on all of them.

    The adapters that were active act on no row but those that name them. Takes effect at once; as a context
    manager, undone on exit. Holds inside `generate` too, with beams. Under gradients every row trains its own
    adapter.

    On a CPU the first mixture that names an adapter moves the factors of its linear layers to lie beside the
    others' (`lorica.layers.rows.blocks`); from then on a mixture costs next to nothing to make. Elsewhere,
    where a factor's memory is also something else's, and where factors have a higher precision than the base,
    they are stacked for each call of `mixed`, and anew after a pass under gradients; changed in another way
    meanwhile, they need another call.

    The first axis of a layer's input must be the batch, or its tokens, one row after the other. To know it,
    the model is shown the first row alone before its first mixed call, without a trace. A layer of which this
    is not so is refused by name when it is called: a table of positions, a layer with the batch second.

    Args:
        model: adapted model.
        names: an adapter's name for each row, or None for the base.

    Raises:
        AdapterError: no such adapter, or one that brings parameters of its own which cannot differ by row
            (trained biases).
        StateError: an adapter is merged, or one of these acts inside a fused attention or encoder, which has
            one weight for all rows, or on experts.
    """

    def __init__(self, model: nn.Module, names: Iterable[str | None]) -> None:
        root, state = adapted(model)
        state.check_unmerged("mix adapters")
        given = names_in(names)
        for name in given:
            if name is not None:
                state.known(name)
        rows = Rows(given)
        rows.axes = Axes(root, state.axes)
        if not rows.names:
            raise AdapterError("mixed needs a name (or None) for each row of the batch, and got none")
        used = [name for name in rows.distinct if name is not None]
        for name in used:
            if not all(piece.rows_differ for piece in state.placing(name)):
                raise AdapterError(
                    f"{name!r} ({method_of(state.configs[name])}) adds parts to the model, which "
                    "cannot differ by row; only LoRA's updates and heads can"
                )
            pieces = state.placing(name)
            own = [path for piece in pieces for path in piece.stand_ins(name) if path in piece.claims(name)]
            if own:
                raise AdapterError(
                    f"{name!r} brings parameters in place of the base's ({listing(own, limit=3)}), which "
                    "cannot differ by row. If that is its start, lorica.extract it, and attach that instead"
                )
        for path, own, expert in _shared_by_rows(root, state):
            if not any(name in own for name in used):
                continue
            if not expert:
                raise StateError(
                    f"{path} is read past its layer, as one weight for all rows; "
                    "adapters on it cannot be mixed in a batch"
                )
            if len(rows.distinct) > 1:
                raise StateError(
                    f"{path} is an expert, which sees some of the tokens; adapters on it cannot be mixed in "
                    "a batch"
                )
        # An active adapter's stand-ins and fused updates act on every row alike.
        watch_calls(root, state)
        self._choice = active(model, (), rows)

    def __enter__(self) -> None:
        """From here on it is a block, as of `active`."""
        self._choice.__enter__()

    def __exit__(self, *error: object) -> None:
        """Go back to what held before."""
        self._choice.__exit__(*error)


def _shared_by_rows(root: nn.Module, state: AdapterState) -> list[tuple[str, Container[str], bool]]:
    """The layers that compute all rows alike: path, the adapters on it, and whether it is an expert."""
    found = state.found.get(_shared_by_rows)
    if found is None:
        found = state.found[_shared_by_rows] = []
        for path, module, parent in walk(root):
            if isinstance(module, LoraLayer):
                if not module.rows_differ or is_expert(path):
                    found.append((path, module.scaling, module.rows_differ))
            elif isinstance(module, SavedModule) and read_by(parent, module):
                found.append((path, module.modules_to_save, False))
    return found


def is_expert(path: str) -> bool:
    """Whether a module is one of several among which a router chooses for each token, as they are named."""
    return any(re.fullmatch(r"(local_)?experts?", part) for part in path.split("."))
