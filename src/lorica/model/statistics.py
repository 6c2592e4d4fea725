"""Running statistics (batch norm), which move in training without being trained: each adapter has its own.

They stand in the base's place while their adapter acts, as trained biases do. So training moves the
adapter's, the base's stay bit for bit, and an adapter's file holds those that moved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lorica.layers import SavedModule
from lorica.model.selection import within_any
from lorica.model.structure import walk
from lorica.state import AdapterState


def running(root: nn.Module, saved: Collection[str] = ()) -> dict[str, Tensor]:
    """Name → running statistic of a model, outside the modules that are trained whole.

    Args:
        root: the model.
        saved: paths of modules that are to be.
    """
    places = list(walk(root))
    whole = [*saved, *(place.path for place in places if isinstance(place.module, SavedModule))]
    return {
        f"{path}.{leaf}" if path else leaf: buffer
        for path, module, _ in places
        if isinstance(module, _NormBase) and not within_any(path, whole)
        for leaf, buffer in module._buffers.items()
        if buffer is not None
    }


def give_statistics(
    root: nn.Module,
    state: AdapterState,
    name: str,
    saved: Collection[str],
    given: Mapping[str, Tensor],
    *,
    trainable: bool,
) -> None:
    """Give an adapter running statistics of its own, before it acts.

    Args:
        root: the model, with the base's own in place.
        state: the model's.
        name: of the adapter.
        saved: paths of the modules that it trains whole.
        given: those that it comes with, by name.
        trainable: whether it moves the others too.
    """
    own = {}
    for path, buffer in running(root, saved).items():
        if path in given or trainable:
            own[path] = given.get(path, buffer).detach().to(buffer, copy=True)
    if own:
        state.statistics[name] = own
