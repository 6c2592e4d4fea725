"""Before a mixed call: does it have a row for each name, and what do the layers see of one row alone?"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.layers import LoraLayer, SavedModule, TrainedTokens
from lorica.layers.rows import Rows, Witness
from lorica.model.watch.watching import as_it_was
from lorica.state import AdapterState
from lorica.tree import walk

# Inputs by which a call tells its number of rows, the surest first.
_MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values")


class Calls:
    """Hooks around the calls of a model and of those parts that are called by themselves."""

    def __init__(self, state: AdapterState) -> None:
        self.adapter_state = state

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the number of rows of an outermost call, and show the model one row, once for its kind."""
        rows = self.adapter_state.rows
        if not isinstance(rows, Rows) or rows.axes.batch is not None or torch.compiler.is_compiling():
            return
        axes, found = rows.axes, _main(module, args, kwargs)
        if found is None:
            return
        axes.check_batch(found.shape[0], len(rows.names))
        axes.batch, axes.outermost = found.shape[0], module
        kind = (module, len(args), frozenset(key for key, value in kwargs.items() if value is not None))
        if len(set(rows.names)) > 1 and kind not in self.adapter_state.shown:
            witness = Witness()
            try:
                with self.adapter_state.only_here(self.adapter_state.choice._replace(rows=witness)):
                    axes.lengths = _show_one(module, args, kwargs, axes.batch)
                axes.failure = None
                self.adapter_state.shown.add(kind)
            except Exception as error:
                axes.failure = error
            axes.alone, axes.calls = witness.shapes, {}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """The call is over; what is called next may be a part by itself."""
        rows = self.adapter_state.rows
        if isinstance(rows, Rows) and rows.axes.outermost is module:
            rows.axes.batch = rows.axes.outermost = None


def watch_calls(root: nn.Module, state: AdapterState) -> None:
    """Put the hooks on a model, once."""
    if state.hooks:
        return
    calls = Calls(state)
    for module in _callable_alone(root):
        state.hooks.append(module.register_forward_pre_hook(calls.before, with_kwargs=True))
        state.hooks.append(module.register_forward_hook(calls.after, always_call=True))


def _callable_alone(root: nn.Module) -> Iterator[nn.Module]:
    """The model, and its parts that are models too: `generate` calls an encoder by itself."""
    modeling = sys.modules.get("transformers.modeling_utils")
    models: tuple[type, ...] = () if modeling is None else (modeling.PreTrainedModel,)
    for path, module, _ in walk(root):
        part = path and "." not in path and module._modules and not isinstance(module, _LISTS)
        adapted = isinstance(module, LoraLayer | SavedModule | TrainedTokens)
        if not path or ((part or isinstance(module, models)) and not adapted):
            yield module


_LISTS = (nn.ModuleList, nn.ModuleDict)


def _main(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input whose first axis is the batch."""
    names = (getattr(module, "main_input_name", None), *_MAIN)
    named = [kwargs.get(name) for name in names if isinstance(name, str)]
    given = [
        value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()
    ]
    return next((value for value in given if value.dim() > 1), given[0] if given else None)


def _show_one(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> frozenset[int]:
    """Call the model on the first row alone, leaving no trace; returns the lengths of its inputs."""
    args, kwargs = _first(args, batch), _first(kwargs, batch)
    on_gpu = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with as_it_was(module, training=False), torch.no_grad(), torch.random.fork_rng(devices=on_gpu):
        module.forward(*args, **kwargs)  # its own hooks are being called already
    return frozenset(t.shape[1] for t in _tensors((args, kwargs)) if t.dim() > 1 and t.shape[0] == 1)


def _first(value: Any, batch: int) -> Any:
    """The first row of what has as many as the batch; a cache is copied."""
    if isinstance(value, Tensor):
        rows = value.dim() and value.shape[0] == batch
        return value[:1] if rows and not _counts_up(value) else value
    if isinstance(value, dict) and type(value) is dict:
        return {key: _first(item, batch) for key, item in value.items()}
    if isinstance(value, Mapping):
        return type(value)(**{key: _first(item, batch) for key, item in value.items()})
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_first(item, batch) for item in value)
    if hasattr(value, "get_seq_length"):
        cache: Any = copy.deepcopy(value)
        if cache.get_seq_length() > 0:
            cache.batch_select_indices(torch.tensor([0]))
        return cache
    return value


def _counts_up(value: Tensor) -> bool:
    """Whether a vector counts positions: as many as the tokens, which may be as many as the rows."""
    if value.dim() != 1 or value.is_floating_point() or value.dtype == torch.bool or len(value) < 2:
        return False
    return bool((value[1:] - value[:-1] == 1).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
