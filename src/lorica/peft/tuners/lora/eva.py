"""EVA: A from the principal directions of each layer's inputs, with PEFT's names and arguments."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.config import LoraConfig
from lorica.errors import ConfigError
from lorica.model import starts
from lorica.model.starts.eva import Progress
from lorica.model.watch.watching import Batches, run
from lorica.peft.utils.other import named_whole


def forward_fn_dict(model: nn.Module, model_input: Any) -> Any:
    """Call the model on a batch of keyword arguments."""
    return run(model, model_input)


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Batches | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Any = ...,
    prepare_layer_inputs_fn: Any = ...,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Carry out ``init_lora_weights="eva"`` on an adapted model; `lorica.model.starts` has lorica's own.

    Args:
        model: wrapped or not, adapted with ``init_lora_weights="eva"``.
        dataloader: batches for the model. None needs `eva_state_dict`.
        eva_state_dict: `get_eva_state_dict`'s result.
        forward_fn: calls the model on a batch.
        prepare_model_inputs_fn: refused: tokens without attention are left out, and those without a target by
            `EvaConfig.use_label_mask`.
        prepare_layer_inputs_fn: refused, likewise.
        adapter_name: name of the adapter.
        gather_distributed_inputs: accepted in one process; see Raises.
        show_progress_bar: show the number of layers that have settled, if tqdm is installed.

    Raises:
        ConfigError: one of the two functions is given, or several processes each have their own data.
        AdapterError: as of lorica's own.
    """
    _check(prepare_model_inputs_fn, prepare_layer_inputs_fn)
    if eva_state_dict is None:
        _check_alone(gather_distributed_inputs)
    with _bar(show_progress_bar and eva_state_dict is None) as progress:
        starts.initialize_lora_eva_weights(
            model,
            dataloader,
            eva_state_dict,
            name=adapter_name,
            forward=forward_fn or run,
            progress=progress,
        )


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Batches,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Any = ...,
    prepare_layer_inputs_fn: Any = ...,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The principal directions of each targeted layer's inputs; see `lorica.model.starts.get_eva_state_dict`.

    Args:
        model: wrapped or not; or not adapted yet, with `peft_config`.
        dataloader: batches for the model.
        peft_config: of a model that is not adapted yet.
        forward_fn: calls the model on a batch.
        prepare_model_inputs_fn: as of `initialize_lora_eva_weights`.
        prepare_layer_inputs_fn: as of `initialize_lora_eva_weights`.
        adapter_name: name of the adapter.
        gather_distributed_inputs: as of `initialize_lora_eva_weights`.
        show_progress_bar: show the number of layers that have settled, if tqdm is installed.

    Returns:
        Module path → A (rank, d_in).

    Raises:
        ConfigError: as `initialize_lora_eva_weights`.
        AdapterError: as of lorica's own.
    """
    _check(prepare_model_inputs_fn, prepare_layer_inputs_fn)
    _check_alone(gather_distributed_inputs)
    name = adapter_name if peft_config is None else None
    peft_config = peft_config and named_whole(model, peft_config)
    with _bar(show_progress_bar) as progress:
        return starts.get_eva_state_dict(
            model, dataloader, peft_config, name=name, forward=forward_fn or run, progress=progress
        )


def _check(model_inputs: Any, layer_inputs: Any) -> None:
    given = {"prepare_model_inputs_fn": model_inputs, "prepare_layer_inputs_fn": layer_inputs}
    for name, function in given.items():
        if function is not ...:
            raise ConfigError(
                f"{name} is not carried: tokens without attention, and with EvaConfig(use_label_mask=True) "
                "those without a target, are left out. Choose others by what the batches hold, and leave it "
                "out"
            )


def _check_alone(gather: bool) -> None:
    distributed = torch.distributed
    if (
        gather
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        raise ConfigError(
            "gather_distributed_inputs=True would make one start of what all processes see, which is not "
            "carried; call get_eva_state_dict in one process, save it, and give eva_state_dict= in all"
        )


@contextlib.contextmanager
def _bar(wanted: bool) -> Iterator[Progress | None]:
    """A progress bar over the layers that have settled, or None."""
    if not wanted or importlib.util.find_spec("tqdm") is None:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="EVA: settled layers") as bar:

        def show(settled: int, total: int) -> None:
            bar.total, bar.n = total, settled
            bar.refresh()

        yield show
