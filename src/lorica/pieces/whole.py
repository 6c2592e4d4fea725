"""A module trained whole (`modules_to_save`), such as a new head: a copy that answers for the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from lorica.check import check_whole
from lorica.errors import TargetError
from lorica.find import HEADS, trained_whole
from lorica.layers import SavedModule
from lorica.layers.masters import CallHooks
from lorica.layers.saved import twin_of
from lorica.piece import Beginning, Held, Piece, Rows
from lorica.pieces import Kind, Search, register
from lorica.state import AdapterState
from lorica.tree import ending_in, module_at, outermost


class WholeCopy(Piece):
    """A trained copy of a module.

    Args:
        path: the module's path.
        module: the module.
        twin: its copy; float32 beside a module in half precision.
        master: whether the copy has a higher precision than the module.
    """

    places = True

    def __init__(self, path: str, module: nn.Module, twin: nn.Module, *, master: bool) -> None:
        super().__init__(path)
        self.module, self.twin, self.master = module, twin, master

    def follow(self, paths: Mapping[nn.Module, str]) -> bool:  # noqa: D102
        self.path = paths.get(self.module, self.path)
        return self.module in paths

    def put(self, root: nn.Module, state: AdapterState, name: str, *, trainable: bool) -> None:  # noqa: D102
        module = self.module
        host = module if isinstance(module, SavedModule) else SavedModule.take(module, state)
        host.add_copy(name, self.twin.requires_grad_(trainable), master=self.master)

    def off(self, root: nn.Module, name: str) -> None:  # noqa: D102
        host = self.module
        assert isinstance(host, SavedModule)
        host.remove_copy(name)
        if not host.modules_to_save:
            host.leave()

    def check_class(self) -> None:  # noqa: D102
        if isinstance(self.module, SavedModule):
            self.module.check_own_class()

    def tensors(self, name: str) -> Iterator[Held]:
        """All tensors of the copy, buffers included."""
        host: Any = self.module
        on = isinstance(host, SavedModule) and name in host.modules_to_save
        twin = host.modules_to_save[name] if on else self.twin
        for leaf, tensor in twin.state_dict(keep_vars=True).items():
            live = f"{self.path}.modules_to_save.{name}.{leaf}"
            yield Held(f"{self.path}.{leaf}", live, tensor, not isinstance(tensor, Parameter))

    def begin_again(self, name: str, at: Beginning) -> Iterator[tuple[Tensor, Tensor]]:
        """The module's own values."""
        for held in self.tensors(name):
            yield held.tensor, at.state.base_tensor(at.root, held.key)

    def claims(self, name: str) -> Mapping[str, Rows]:  # noqa: D102
        return {self.path: None}


class WholeModules(Kind):
    """Finds the modules that `modules_to_save`, and a `task_type` with a new head, mean."""

    def find(self, search: Search) -> Iterable[Piece]:  # noqa: D102
        config = search.lora or search.config
        if search.adapter is not None:
            search.whole = outermost(ending_in(search.places, search.config.modules_to_save or []))
            for path, module in search.whole.items():
                check_whole(path, module)
        else:
            search.whole = trained_whole(search.places, config)
            heads = sorted({path.rpartition(".")[2] for path in search.whole})
            named = [*(config.modules_to_save or []), *(heads if config.task_type in HEADS else [])]
            search.changes["modules_to_save"] = list(dict.fromkeys(named)) or None
        return [self._copy(search, path, module) for path, module in search.whole.items()]

    def _copy(self, search: Search, path: str, module: nn.Module) -> WholeCopy:
        if search.dry:
            return WholeCopy(path, module, module, master=False)
        parent = module_at(search.root, path.rpartition(".")[0]) if path else None
        try:
            twin, master = twin_of(module, parent, search.state)
            for part in twin.modules():  # those of adapters that act on the module itself
                CallHooks.off(part)
        except Exception as error:
            raise TargetError(
                f"{path} cannot be trained whole, for it cannot be copied; drop what a call left in it, "
                "such as its last output; of weight_norm take torch.nn.utils.parametrizations.weight_norm. "
                f"Copying said: {error}"
            ) from error
        return WholeCopy(path, module, twin, master=master)


def copies_of(state: AdapterState, name: str) -> list[Held]:
    """The tensors of all modules that an adapter trains whole."""
    pieces = (piece for piece in state.pieces[name] if isinstance(piece, WholeCopy))
    return [held for piece in pieces for held in piece.tensors(name)]


register(WholeModules(), "modules_to_save", "task_type")
