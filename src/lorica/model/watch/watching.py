"""Showing a model data before it is trained, without leaving a trace on it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import AdapterError

Batches = Iterable[Any]
Forward = Callable[[nn.Module, Any], Any]


@contextlib.contextmanager
def as_it_was(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode for a while.

    On every way out each module gets its own mode back, and each parameter its `requires_grad` and `grad`.
    """
    modes = {module: module.training for module in model.modules()}
    parameters = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, (requires_grad, grad) in parameters.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Have a function look at what some modules are given, while this lasts.

    Args:
        modules: by path.
        look: is called with the path and the module's first input, before each call of the module.
    """

    def hook(path: str) -> Callable[..., None]:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            look(path, args[0] if args else next(iter(kwargs.values())))

        return show

    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # what was compiled before does not call new hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for path, module in modules.items():
            handle = module.register_forward_pre_hook(hook(path), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def run(model: nn.Module, inputs: Any) -> Any:
    """Call the model on one batch of a data loader: keyword arguments, positional ones, or a tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def run_all(model: nn.Module, data: Batches | Callable[[], Any], step: Forward) -> None:
    """Show a model its data: each batch of a data loader, or whatever a function of the user's does.

    Raises:
        AdapterError: the data loader is empty.
    """
    if callable(data):
        data()
        return
    check_batches(data)
    device = device_of(model)
    for inputs in data:
        step(model, to_device(inputs, device))


def check_batches(batches: Batches) -> None:
    """Refuse a data loader with nothing in it.

    Raises:
        AdapterError: it is empty.
    """
    if isinstance(batches, Sized) and len(batches) == 0:
        raise AdapterError("the data loader is empty; the start is made from the batches it gives")


def to_device(inputs: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs: that of its first parameter."""
    return next(model.parameters()).device
