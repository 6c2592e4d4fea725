"""A training step on the meta device: what it would hold at its fullest moment, and compute."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Step(NamedTuple):
    """The cost of a step of training.

    Args:
        held: bytes beside the parameters at the fullest moment: activations, and the gradients made so far.
        flops: floating-point operations of the matrix products, forward and backward.
    """

    held: int
    flops: int


class _Valueless(TorchDispatchMode):
    """Answers the questions that only values could answer, such as whether any token is padding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class _Held(TorchDispatchMode):
    """Follows every tensor's memory from the operation that makes it to the moment nobody needs it."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = [*known.parameters(), *known.buffers()]
        self._alive = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def trace(model: nn.Module, inputs: Mapping[str, Tensor], *, checkpointing: bool = False) -> Step:
    """Run a forward and a backward pass without values, and see what they hold and compute.

    Args:
        model: on the meta device, with what trains set to require gradients.
        inputs: on the meta device; with labels, the model's own loss is taken, else a sum
            of its first output.
        checkpointing: whether each block keeps its input alone and is computed again.
    """
    flops_of = {
        torch.ops.aten.addmm_: _addmm,  # the counter knows addmm, and not that
        _FUSED: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        _FUSED_BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    memory, counter = _Held(model), FlopCounterMode(display=False, custom_mapping=flops_of)
    again = _recomputed(blocks(model)) if checkpointing else contextlib.nullcontext()
    with _fused_attention(), again:
        for observer in (memory, counter):  # one after the other: the counter holds what it counts
            with observer, _Valueless():
                _loss(model, inputs).backward()
            for parameter in model.parameters():
                parameter.grad = None
    return Step(memory.peak, counter.get_total_flops())


def _loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss alone: a training loop drops the other outputs before it goes back."""
    output = model(**inputs)
    return output["loss"] if "loss" in output else output[0].sum()


@contextlib.contextmanager
def _recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules keep their input alone, and run again in the backward pass."""
    changed = list(modules)
    for module in changed:
        # What numbers come is of no matter here, nor that they come again.
        module.forward = functools.partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for module in changed:
            del module.forward


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
