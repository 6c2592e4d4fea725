"""Ranks on which different adapters train in one step: an error, for their gradients would be averaged.

`fully_shard` sums up gradients by their place in a block, whosever they are. So the ranks of a sharded model
compare what acts in each of its training passes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import distributed, nn

from lorica.errors import StateError, listing
from lorica.model.sharded import part_of
from lorica.state import STATE, AdapterState


class Agreement:
    """A hook on a sharded model.

    On a CPU, and in the first pass anywhere, the ranks compare before they compute. Later passes on an
    accelerator do not wait for it: what differs in one is told at the start of the next.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        part: Any = part_of(root)
        self.groups = part.device_mesh._get_root_mesh().get_all_groups()
        self.device = torch.device(part.device_mesh.device_type)
        self.sent: list[tuple[list[str], torch.Tensor]] = []

    def __call__(self, root: nn.Module, args: Any) -> None:
        """Compare.

        Raises:
            StateError: on another rank other adapters act.
        """
        state: AdapterState | None = root.__dict__.get(STATE)
        if state is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        waits = not self.sent or self.device.type == "cpu"
        while self.sent:
            _check(*self.sent.pop())
        acting = state.active if state.rows is None else (name for name in state.rows.names if name)
        names = sorted(set(acting))
        digest = hashlib.blake2b("/".join(names).encode(), digest_size=7).digest()
        number = int.from_bytes(digest, "little")
        extremes = torch.tensor([number, -number], device=self.device)
        for group in self.groups:
            distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX, group=group)
        if waits:
            _check(names, extremes)
        self.sent = [(names, extremes)]


def _check(names: list[str], extremes: torch.Tensor) -> None:
    if extremes.sum().item():
        raise StateError(
            f"on rank {distributed.get_rank()} {listing(map(repr, names)) or 'no adapter'} trains, and on "
            "another rank something else; a sharded model averages gradients over its ranks, so let the same "
            "adapters act on all of them in each step"
        )


def compare_ranks(root: nn.Module, state: AdapterState) -> Agreement | None:
    """Put the hook on a model, if it is sharded and has none yet; returns the new one."""
    hooks = root._forward_pre_hooks.values()
    if "_is_fsdp_managed_module" not in root.__dict__ or any(isinstance(hook, Agreement) for hook in hooks):
        return None
    if part_of(root) is None:  # FSDP1's, which lays whole tensors end to end
        return None
    hook = Agreement(root)
    state.hooks.append(root.register_forward_pre_hook(hook))
    return hook
