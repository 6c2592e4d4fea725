"""Logits that are not computed until somebody needs them, and a loss that does not.

A model's own forward runs as it is, wrappers and hooks and all; only its head answers with `DeferredLogits`,
which remember what they were to be made of. What architectures then do to logits is done to that memory:

    head(hidden)                 remember head and hidden
    logits / cap, tanh, .float() remember the step: softcapping, scaling, upcasting
    logits[:, :-1], .view(-1, V) index or reshape hidden instead
    F.cross_entropy(logits, …)   `chunked_cross_entropy`
    anything else                compute them after all, and go on as if nothing had been deferred
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.layers import SavedModule, SwappedModule
from lorica.train.trainer.loss import CHUNK, LinearHead, chunked_cross_entropy

Step = Callable[[Tensor], Tensor]


class Head(NamedTuple):
    """The computation of logits.

    Args:
        compute: the head's own forward, or its weights where it is a plain linear layer.
        parameters: those of its parameters that train.
        chunk: tokens whose logits may exist at once.
        on_whole: called with the name of an operation for which all of them had to be computed.
    """

    compute: Step
    parameters: tuple[Tensor, ...]
    chunk: int
    on_whole: Callable[[str], None]


class DeferredLogits(Tensor):
    """A tensor of logits (..., vocabulary) without its numbers."""

    head: Head
    hidden: Tensor
    """(..., width): what the head is to read."""
    sample: Tensor
    """(0, vocabulary): the logits of no token, for their type and place."""
    steps: tuple[Step, ...]
    """Operations done to each logit since."""

    @staticmethod
    def __new__(
        cls: type[DeferredLogits], head: Head, hidden: Tensor, sample: Tensor, steps: tuple[Step, ...] = ()
    ) -> DeferredLogits:
        """Remember; `sample` has been through the steps."""
        shape = (*hidden.shape[:-1], sample.shape[-1])
        logits = Tensor._make_wrapper_subclass(cls, shape, dtype=sample.dtype, device=sample.device)
        logits.head, logits.hidden, logits.sample, logits.steps = head, hidden, sample, steps
        return logits

    def __init__(self, *_: Any) -> None:
        """Nothing is left to do."""

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The logits of some rows of hidden, steps included."""
        return self.after(self.head.compute(hidden))

    def after(self, logits: Tensor) -> Tensor:
        """The steps, applied to some rows of computed logits."""
        for step in self.steps:
            logits = step(logits)
        return logits

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply the operation to the memory where that can be done; else compute the logits."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(name)
        if rule is not None and args and isinstance(args[0], cls):
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*_whole(args, name), **_whole(kwargs, name))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute for code that reaches past torch's own functions."""
        return func(*_whole(args, str(func)), **_whole(kwargs or {}, str(func)))


@contextmanager
def deferred_logits(
    head: nn.Module, *, chunk: int = CHUNK, on_whole: Callable[[str], None] = lambda name: None
) -> Iterator[None]:
    """Let a model's head return `DeferredLogits`.

    Adapters and trained copies of the head act: each chunk goes through the head's own forward.
    Where rows of the batch have adapters of their own the head computes at once, since a chunk of tokens no
    longer knows its rows.

    Args:
        head: the module whose output is the logits, such as ``model.get_output_embeddings()``. It treats
            every token by itself.
        chunk: tokens whose logits may exist at once.
        on_whole: called with the name of an operation for which all of them had to be computed.
    """
    before = vars(head).get("forward")
    compute: Callable[..., Tensor] = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        by_row = isinstance(head, SwappedModule) and head.adapter_state.rows is not None
        if by_row or args or kwargs or hidden.ndim < 2:
            return compute(hidden, *args, **kwargs)
        # In the present grad mode: autocast would keep a weight cast under no_grad, and it would never train.
        sample = compute(hidden.new_empty(0, hidden.shape[-1])).detach()
        parameters = tuple(p for p in head.parameters() if p.requires_grad)
        return DeferredLogits(
            Head(_linear(head, compute) or compute, parameters, chunk, on_whole), hidden, sample
        )

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(head)["forward"]
        else:
            vars(head)["forward"] = before


def _linear(head: nn.Module, compute: Callable[..., Tensor]) -> LinearHead | None:
    """The head's weights, or those of its acting copy, where it does nothing but multiply by them."""
    if isinstance(head, SavedModule):
        name = head.acting_name()
        twin = None if name is None else head.answering(name)
        return _linear(twin, twin.forward) if twin is not None else None
    if isinstance(head, nn.Linear) and getattr(compute, "__func__", None) is nn.Linear.forward:
        return LinearHead(head.weight, head.bias)
    return None


def _whole(item: Any, name: str) -> Any:
    """An argument with all deferred logits in it computed."""
    if isinstance(item, DeferredLogits):
        item.head.on_whole(name)
        return item.logits_of(item.hidden)
    if isinstance(item, dict):
        return {key: _whole(value, name) for key, value in item.items()}
    if type(item) in (tuple, list):
        return type(item)(_whole(value, name) for value in item)
    return item


def _same(func: Callable[..., Any], logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    return logits


def _each(func: Callable[..., Any], logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """An operation on each logit by itself, with nothing else that varies or trains."""
    for other in (*args, *kwargs.values()):
        if isinstance(other, Tensor) and (other.ndim > 0 or other.requires_grad):
            return NotImplemented

    def step(x: Tensor) -> Tensor:
        return func(x, *args, **kwargs)

    with torch.no_grad():
        sample = step(logits.sample)
    return DeferredLogits(logits.head, logits.hidden, sample, (*logits.steps, step))


def _reshape(func: Callable[..., Any], logits: DeferredLogits, *sizes: Any, **kwargs: Any) -> Any:
    """A new shape of all dimensions but the last."""
    shape = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if kwargs or not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    vocabulary = logits.sample.shape[-1]
    if shape[-1] != vocabulary and not (
        shape[-1] == -1 and math.prod(shape[:-1]) == logits.hidden[..., 0].numel()
    ):
        return NotImplemented
    hidden = logits.hidden.reshape(*shape[:-1], logits.hidden.shape[-1])
    return DeferredLogits(logits.head, hidden, logits.sample, logits.steps)


def _index(func: Callable[..., Any], logits: DeferredLogits, index: Any) -> Any:
    """Slices that leave the last dimension as it is."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, (slice, EllipsisType)) for part in parts):
        return NotImplemented
    reaches_last = Ellipsis in parts or len(parts) == logits.hidden.ndim
    if reaches_last and parts[-1] is not Ellipsis and parts[-1] != slice(None):
        return NotImplemented
    return DeferredLogits(logits.head, logits.hidden[index], logits.sample, logits.steps)


def _cross_entropy(
    func: Callable[..., Any],
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Torch's signature; classes as targets and a scalar as result, or the numbers are needed."""
    plain = logits.hidden.ndim == 2 and target.ndim == 1 and target.dtype == torch.long
    if (
        not plain
        or weight is not None
        or size_average is not None
        or reduce is not None
        or reduction not in ("mean", "sum")
    ):
        return NotImplemented
    return chunked_cross_entropy(
        logits.head.compute,
        logits.hidden,
        target,
        logits.head.parameters,
        after=logits.after,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        chunk=logits.head.chunk,
    )


_FACTS = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "requires_grad",
        "grad_fn",
        "is_leaf",
        "is_cuda",
        "is_cpu",
        "is_mps",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "itemsize",
        "size",
        "dim",
        "numel",
        "nelement",
        "element_size",
        "is_floating_point",
        "is_complex",
        "__len__",
        "__hash__",
    ]
)
"""Attributes of logits that are known without computing any."""

_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("float", "double", "to", "type_as", "tanh", "neg"), _each),
    **dict.fromkeys(("mul", "div", "add", "sub", "multiply", "divide", "true_divide"), _each),
    **dict.fromkeys(("view", "reshape"), _reshape),
    "contiguous": _same,
    "__getitem__": _index,
    "cross_entropy": _cross_entropy,
}
"""Operation, by its name as a function or a method → what to do instead; it may answer NotImplemented."""
