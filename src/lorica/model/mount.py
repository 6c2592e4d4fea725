"""The moment an adapter goes onto a model: classes are swapped and parameters handed over."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.adapter import check_name
from lorica.config import AdapterConfig, members
from lorica.errors import AdapterError, TargetError
from lorica.layers import (
    LoraEmbedding,
    LoraLayer,
    LoraParameters,
    Part,
    SavedModule,
    TrainedTokens,
    read_by,
    tie_factors,
)
from lorica.layers.quantized import hold_layout
from lorica.model import pretrained
from lorica.model.statistics import keep_still, release
from lorica.model.structure import STATE, Target, added_modules, base_parameters, find_adapted
from lorica.model.tied import tie_copies
from lorica.model.tokens import TokenTarget
from lorica.model.uncalled import watch_next_pass
from lorica.model.wrapped import check_unnoted, unwrapped
from lorica.state import AdapterState, Start, module_at


class Mount(NamedTuple):
    """A target with the parameters it is about to get."""

    target: Target
    A: Parameter
    B: Parameter
    scale: float
    dropout: float
    magnitude: Parameter | None = None
    bias: Parameter | None = None
    start: Start | None = None


def open_for(model: nn.Module, name: str, *, trainable: bool) -> tuple[nn.Module, AdapterState]:
    """The adapted model in `model` and its state; where there is none yet, `model` and a new state.

    A model that `torch.compile` wrapped is adapted inside its wrapper.

    Raises:
        AdapterError: the name is taken, or cannot be one.
        StateError: an adapter is merged, or the model was wrapped for training on several devices.
    """
    check_name(name)
    root, state = find_adapted(model) or (unwrapped(model), AdapterState())
    state.check_unmerged("add an adapter")
    if name in state.configs:
        raise AdapterError(
            f"the model already has an adapter named {name!r}; give another name, or "
            f"lorica.detach(model, {name!r}) first"
        )
    check_unnoted(root, trainable=trainable)
    return root, state


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector still: what an adapter allocates stays, so looking at it again is in vain.

    A hundred adapters are some twenty thousand small modules.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parameter_for(target: Target, factor: Tensor, *, copy: bool) -> Parameter:
    """The factor as a parameter on the layer's device, in float32 or the layer's higher precision.

    Args:
        target: what the factor is for.
        factor: its values.
        copy: whether it must have memory of its own.
    """
    anchor = target.anchor
    precision, device = torch.float32, None
    if anchor is not None:
        device = anchor.device
        if anchor.is_floating_point():
            precision = torch.promote_types(anchor.dtype, torch.float32)
    return Parameter(factor.detach().to(device=device, dtype=precision, copy=copy).contiguous())


def mount(
    root: nn.Module,
    state: AdapterState,
    name: str,
    config: AdapterConfig,
    mounts: list[Mount],
    saved: Mapping[str, nn.Module],
    slots: Mapping[str, Parameter],
    parts: Sequence[Part] = (),
    tokens: Sequence[tuple[TokenTarget, Parameter]] = (),
    tied: Sequence[tuple[Target, str]] = (),
    *,
    trainable: bool,
) -> None:
    """Put an adapter's parameters on the model; the base is frozen when the first one comes.

    Args:
        root: the model.
        state: the model's, or a new one.
        name: of the adapter.
        config: how it was made.
        mounts: targets with their factors.
        saved: path → module to give a copy that is trained whole.
        slots: parameter name → parameter that takes its place while the adapter acts.
        parts: what is added to modules.
        tokens: tables with their trained rows.
        tied: targets that share the factors of an embedding, and its path.
        trainable: whether all of these train.

    Raises:
        TargetError: a module cannot be copied; the model is untouched.
    """
    _copy(root, state, name, saved, trainable=trainable)
    if not state.configs:
        state.frozen = [parameter for parameter in base_parameters(root).values() if parameter.requires_grad]
        for parameter in state.frozen:
            parameter.requires_grad_(False)
        state.layouts = hold_layout(root)
        setattr(root, STATE, state)
        pretrained.enter(root)
        keep_still(root, state)
    state.configs[name] = config
    for target, A, B, scale, dropout, magnitude, bias, _ in mounts:
        module = target.module
        host = module if isinstance(module, LoraLayer) else target.layer.take(module, state)
        if isinstance(host, LoraParameters):
            assert target.parameter is not None
            host.add_parameter(name, target.parameter, _train(A, trainable), _train(B, trainable), scale)
            continue
        host.add_factors(name, _train(A, trainable), _train(B, trainable), scale, dropout)
        if magnitude is not None:
            host.add_magnitude(name, _train(magnitude, trainable))
        if bias is not None:
            host.add_bias(name, _train(bias, trainable))
    for target, path in tied:
        module, table = target.module, module_at(root, path)
        assert isinstance(table, LoraEmbedding)
        host = module if isinstance(module, LoraLayer) else target.layer.take(module, state)
        tie_factors(host, name, table)
    starts = {m.target.weight_path: m.start for m in mounts if m.start is not None}
    if starts:
        state.starts[name] = starts
    rows_of = {path: frozenset(table.indices) for table, _ in tokens for path in table.modules}
    own = {**dict.fromkeys(saved), **rows_of}
    if own:
        state.whole[name] = own
    lora, _ = members(config)
    if lora is not None and lora.ensure_weight_tying:
        tie_copies(saved, name)
    for table, rows in tokens:
        for path, module in table.modules.items():
            host = module if isinstance(module, TrainedTokens) else TrainedTokens.take(module, state)
            host.add_rows(name, table.indices, _train(rows, trainable), tied=path != table.path)
    if parts:
        state.parts[name] = tuple(part.place for part in parts)
    for part in parts:
        add_part(root, state, name, part, trainable=trainable)
    if mounts or tied:
        watch_next_pass(root)
    if slots:
        state.slots[name] = {path: _train(parameter, trainable) for path, parameter in slots.items()}


def _copy(
    root: nn.Module, state: AdapterState, name: str, saved: Mapping[str, nn.Module], *, trainable: bool
) -> None:
    """Give each module a copy for an adapter; where one cannot be copied, none has any."""
    hosts: list[SavedModule] = []
    for path, module in saved.items():
        if not isinstance(module, SavedModule):
            module = SavedModule.take(module, state)
        hosts.append(module)
        try:
            parent = module_at(root, path.rpartition(".")[0]) if path else None
            module.add_copy(name, trainable=trainable, master=not read_by(parent, module))
            release(module.modules_to_save[name])
        except Exception as error:
            for host in hosts:
                if name in host.modules_to_save:
                    host.remove_copy(name)
                if not host.modules_to_save:
                    host.leave()
            raise TargetError(
                f"{path} cannot be trained whole, for it cannot be copied; drop what a call left in it, "
                "such as its last output; of weight_norm take torch.nn.utils.parametrizations.weight_norm. "
                f"Copying said: {error}"
            ) from error


def add_part(root: nn.Module, state: AdapterState, name: str, part: Part, *, trainable: bool) -> None:
    """Add an adapter's part to a module of the base, which becomes its host if it is none yet."""
    host = part.module
    if not isinstance(host, part.host):
        # A root that writes adapters does so whatever else it hosts: that class stays the outermost.
        pretrained.leave(host)
        host = part.host.take(host, state)
        if host is root:
            pretrained.enter(root)
    host.add_part(name, part.part.requires_grad_(trainable))


def remove_parts(root: nn.Module, name: str) -> None:
    """Take an adapter's parts off; a module that hosts no other is its own class again."""
    for host in added_modules(root).values():
        if name in host.parts:
            host.remove_part(name)
        if not host.parts:
            pretrained.leave(host)
            host.leave()
            if host is root:
                pretrained.enter(root)


def _train(parameter: Parameter, trainable: bool) -> Parameter:
    parameter.requires_grad = trainable
    return parameter
