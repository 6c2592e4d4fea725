"""A training step on the meta device: what it would hold at its fullest moment, and compute."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Step(NamedTuple):
    """What a step of training takes.

    Args:
        held: bytes beside the parameters at the fullest moment: activations, and the gradients made so far.
        flops: floating-point operations of the matrix products, forward and backward.
        held_checkpointed: the same where each block keeps its input alone and is computed again.
        flops_checkpointed: the same, with the blocks' second forward pass.
        block: bytes that the largest block holds for its backward pass.
    """

    held: int
    flops: int
    held_checkpointed: int
    flops_checkpointed: int
    block: int


class _Held(TorchDispatchMode):
    """Follows every tensor's memory from the operation that makes it to the moment nobody needs it."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = [*known.parameters(), *known.buffers()]
        self._alive = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a question that only values could answer, such as whether any token is padding
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._meet(item.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def trace(model: nn.Module, inputs: Mapping[str, Tensor]) -> Step:
    """Run a forward and a backward pass without values, and see what they hold and compute.

    Args:
        model: on the meta device, with what trains set to require gradients.
        inputs: on the meta device; with labels, the model's own loss is taken, else a sum
            of its first output.
    """
    flops_of = {
        torch.ops.aten.addmm_: _addmm,  # the counter knows addmm, and not that
        _FUSED: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        _FUSED_BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    kept: list[int] = []  # bytes that each block holds for its backward pass
    inputs_of_blocks: list[int] = []
    flops_of_blocks: list[int] = []
    entered: list[tuple[int, int]] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        inputs_of_blocks.append(given.nbytes if given is not None else 0)
        entered.append((memory.now, counted.get_total_flops()))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        held, flops = entered.pop()
        kept.append(memory.now - held)
        flops_of_blocks.append(counted.get_total_flops() - flops)

    counter = FlopCounterMode(display=False, custom_mapping=flops_of)
    with _fused_attention(), counter as counted, _Held(model) as memory:
        hooks = [
            hook
            for block in blocks(model)
            for hook in (
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(leave),
            )
        ]
        try:
            output = model(**inputs)
            loss = output["loss"] if "loss" in output else output[0].sum()
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        del output, loss
    for parameter in model.parameters():
        parameter.grad = None
    saved = sum(kept) - max(kept, default=0) - sum(inputs_of_blocks)
    flops = counted.get_total_flops()
    again = flops + sum(flops_of_blocks)
    return Step(memory.peak, flops, memory.peak - max(saved, 0), again, max(kept, default=0))


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Let attention be computed as on a device: without the matrix of all pairs, unless dropout falls on it.

    On the meta device torch has the plain way alone, which keeps that matrix for the backward pass.
    """
    plain = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p or query.dim() != 4:
            return plain(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return _FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks: what its outermost lists of several modules of one class hold."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()
    for module in model.modules():
        children = list(module) if isinstance(module, nn.ModuleList) else []
        if len(children) > 1 and len({type(child) for child in children}) == 1 and module not in seen:
            found += children
            seen.update(inner for child in children for inner in child.modules())
    return found


def _addmm(_: Any, left: tuple[int, int], right: tuple[int, int], **_settings: Any) -> int:
    return 2 * left[0] * left[1] * right[1]
