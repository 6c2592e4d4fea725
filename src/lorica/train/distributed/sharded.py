"""A run whose processes hold a part of every weight each, and train one copy of the model together (FSDP2).

    adapt ──▶ spread_model ──▶ train ──▶ extract, by all ──▶ the first writes

A checkpoint is the one that any other run has, in the same files: the adapter and the optimizer's state are
whole in it, and it is read in whatever way the processes share the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from lorica.errors import ConfigError
from lorica.train.distributed.group import world
from lorica.train.settings import ENGINES
from lorica.tree import is_sharded, spread, whole


def check_engine(engine: str) -> None:
    """Refuse a way to share a model that is not known, or that needs more processes.

    Raises:
        ConfigError: naming it.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {ENGINES}, not {engine!r}")
    if engine == "fsdp2" and world() == 1:
        raise ConfigError(
            "the engine fsdp2 spreads a model over several processes, and this run has one; start it in more "
            "(--launch.processes), or leave out --launch.engine"
        )


def spread_model(model: nn.Module, console: Console) -> None:
    """Leave each process of a run its part of an adapted model, in place."""
    from lorica.parallel import shard

    shard(model)
    count = world()
    console.print(f"each of {count} processes holds 1/{count} of every weight (FSDP2)", highlight=False)


def is_in_parts(model: Any) -> bool:
    """Whether `fully_shard` has spread a model, so that each forward pass needs all processes."""
    return "_is_fsdp_managed_module" in getattr(model, "__dict__", ())


@contextlib.contextmanager
def gathered_state(optimizer: Any, *, wanted: bool) -> Iterator[None]:
    """Within it, an optimizer tells its state whole, on the CPU; every process must enter.

    Args:
        optimizer: over what trains.
        wanted: whether this process keeps it. The others only give their parts.
    """
    found = optimizer.state_dict()
    if not any(is_sharded(value) for each in found["state"].values() for value in each.values()):
        yield
        return
    state: dict[Any, dict[str, Any]] = {}
    for place, each in found["state"].items():
        for name, value in each.items():
            entire = whole(value) if isinstance(value, Tensor) else value
            if wanted:
                state.setdefault(place, {})[name] = entire.cpu() if isinstance(entire, Tensor) else entire
    vars(optimizer)["state_dict"] = lambda: {**found, "state": state}
    try:
        yield
    finally:
        del vars(optimizer)["state_dict"]


def spread_state(optimizer: Any) -> None:
    """Leave an optimizer's state in parts, as its parameters are; what a file holds of it is whole."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {})
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    kept[name] = spread(value, parameter)


@contextlib.contextmanager
def gathered_parts(model: Any) -> Iterator[bool]:
    """Within it, a model writes texts though it is in parts; whether it is."""
    if not is_in_parts(model):
        yield False
        return
    if not model.config.is_encoder_decoder:
        yield True
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    # Its encoder is asked by itself, outside of the model's own forward pass, where weights are gathered.
    before = vars(model).get("generate")
    register_fsdp_forward_method(model, "generate")
    try:
        yield True
    finally:
        if before is None:
            del vars(model)["generate"]
        else:
            vars(model)["generate"] = before
