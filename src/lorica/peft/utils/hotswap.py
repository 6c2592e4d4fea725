"""Replace an adapter by another under the same name, without recompiling.

Compiled code depends on shapes, addresses and scales. So the new values are written into the old tensors: a
lower rank is padded with zeros, and B takes up the ratio of the scales.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import lorica
from lorica.adapter import Adapter, Factors
from lorica.checkpoint.hub import locate
from lorica.checkpoint.peft_tensors import from_tensors
from lorica.config import LoraConfig as CoreConfig
from lorica.config import changes_base, exactly
from lorica.errors import AdapterError, ConfigError, LoricaWarning, StateError
from lorica.layers import lora_layers
from lorica.model.adapt import attach_finite
from lorica.model.merging.merged import stay_adapted
from lorica.peft.config import as_peft_config, check_options, split_hub
from lorica.peft.utils.save_and_load import conversions, read
from lorica.state import AdapterState, adapted, find_adapted

_PREFIX = "base_model.model."
# The adapter's name in a live name, and the suffix that the file's names lack.
_LIVE = (
    r"\.(lora_[AB]|modules_to_save)\.{name}(?=\.)"
    r"|\.(lora_magnitude_vector)\.{name}\.weight$"
    r"|\.(lora_embedding_[AB]|trainable_tokens_delta)\.{name}$"
)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Replace an adapter on a model by a saved one.

    Args:
        model: wrapped or not, compiled or not.
        model_name_or_path: folder, or name on the Hub.
        adapter_name: of the old adapter; the new one takes its name, and acts and trains as it did.
        torch_device: accepted without effect: the values stay on the old ones' device.
        kwargs: ``subfolder``, ``revision``, ``token`` and other options of downloads.

    Raises:
        FileError: a file is missing or damaged.
        AdapterError: no adapter of that name, or the new one does not fit the model; nothing has changed.
        StateError: an adapter is merged.
    """
    hub, rest = split_hub(kwargs)
    check_options(rest)
    renames = conversions(adapted(model)[0], None)
    _exchange(model, read(locate(model_name_or_path, **hub), key_mapping=renames), adapter_name)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: CoreConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, from tensors.

    Args:
        model: wrapped or not, compiled or not.
        state_dict: tensors by their names in PEFT's file or on the live model.
        adapter_name: of the old adapter.
        config: of the new one.
        parameter_prefix: accepted without effect: there is LoRA alone.

    Raises:
        AdapterError: no adapter of that name, or the new one does not fit; nothing has changed.
        StateError: an adapter is merged.
    """
    live = re.compile(_LIVE.format(name=re.escape(adapter_name)))
    tensors = {
        _PREFIX + live.sub(r".\1\2\3", key.removeprefix(_PREFIX)): tensor
        for key, tensor in state_dict.items()
    }
    adapter = from_tensors(tensors, as_peft_config(config))
    adapter.check_finite()
    _exchange(model, adapter, adapter_name)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: CoreConfig | Mapping[str, CoreConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Pad the adapters' factors to a rank, before compiling, so that adapters up to that rank fit.

    Args:
        model: wrapped or not; its output stays the same.
        target_rank: the highest rank of the adapters to come; None leaves the ranks.
        config: accepted without effect: scales are not compiled in, since B takes up their ratios.
        check_compiled: if the model is already compiled: ``"error"`` refuses, ``"warn"`` warns and goes on,
            ``"ignore"`` goes on.

    Raises:
        StateError: the model is compiled already, or carries no adapter.
        ConfigError: the rank is not a positive integer, or lower than an adapter's; or `check_compiled` has
            another value.
        AdapterError: the rank is not a multiple of a convolution's groups, or LoftQ quantized the base for
            the present rank.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        )
    if find_adapted(model) is None:
        raise StateError(f"No adapter layers found on the model: this {type(model).__name__} carries none")
    if hasattr(model, "_orig_mod") and check_compiled == "error":
        raise StateError(
            "Call prepare_model_for_compiled_hotswap *before* compiling the model: it is compiled already"
        )
    if hasattr(model, "_orig_mod") and check_compiled == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled; what was "
            "compiled for other ranks is compiled anew",
            LoricaWarning,
            stacklevel=2,
        )
    if target_rank is None:
        return
    root, state = adapted(model)
    state.check_unmerged("change the rank of adapters")
    found = {name: lorica.extract(root, name) for name in state.configs}
    highest = max(f.r for adapter in found.values() for f in adapter.factors.values())
    if target_rank < highest:
        raise ConfigError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
            f"({highest}); give the highest rank that is to come"
        )
    wider = {name: _at_rank(adapter, target_rank) for name, adapter in found.items()}
    for name, adapter in wider.items():
        _replace(model, adapter, name)


def _exchange(model: nn.Module, new: Adapter, name: str) -> None:
    """Replace the adapter of that name by the new one; others may be merged."""
    root, state = adapted(model)
    if state.known(name) in state.merged:
        state.check_unmerged("swap an adapter")
    if not state.merged:
        _put(root, state, new, name)
        return
    merged, into, shown = state.merged, state.aside.into, state.aside.shown
    lorica.restore(root)
    try:
        _put(root, state, new, name)
    finally:
        lorica.merge(root, merged, into=into)
        if shown:
            stay_adapted(root)


def _put(root: nn.Module, state: AdapterState, new: Adapter, name: str) -> None:
    live = lorica.extract(root, name)
    # Where its start was taken out of W0, the old one's place is beside another weight.
    if state.starts_in(name) or not _fits_in(new, live):
        _replace(root, new, name)
        return
    with torch.no_grad():
        for path, old in live.factors.items():
            given = new.factors.get(path)
            if given is None:
                old.A.zero_()
                old.B.zero_()
                continue
            A, B = _at(given, old.r)
            old.A.copy_(A)
            old.B.copy_(B * (given.scale / old.scale))
            for ours, theirs in ((old.magnitude, given.magnitude), (old.bias, given.bias)):
                if ours is not None and theirs is not None:
                    ours.copy_(theirs if ours is old.magnitude else theirs * (given.scale / old.scale))
        for key, tensor in live.extras.items():
            tensor.copy_(new.extras[key])


def _fits_in(new: Adapter, live: Adapter) -> bool:
    """Whether the new values fit into the live tensors."""
    if new.extras.keys() != live.extras.keys() or not new.factors.keys() <= live.factors.keys():
        return False
    if new.lora.lora_dropout != live.lora.lora_dropout:
        return False
    plain = all(f.magnitude is None and f.bias is None for f in live.factors.values())
    if not plain and new.factors.keys() != live.factors.keys():
        return False
    return all(_has_room(f, live.factors[path]) for path, f in new.factors.items()) and all(
        tensor.shape == live.extras[key].shape for key, tensor in new.extras.items()
    )


def _has_room(new: Factors, live: Factors) -> bool:
    return (
        new.kind == live.kind
        and new.r <= live.r
        and new.A.shape[1:] == live.A.shape[1:]
        and new.B.shape[0] == live.B.shape[0]
        and _groups(new) == _groups(live)
        and (new.magnitude is None) == (live.magnitude is None)
        and (new.bias is None) == (live.bias is None)
    )


def _replace(model: nn.Module, new: Adapter, name: str) -> None:
    """Take the old adapter off and put the new one on; if that fails, the old one is put back."""
    root, state = adapted(model)
    active, old = state.active, lorica.extract(root, name)
    trained = {place: parameter.requires_grad for place, parameter in _parameters(root, name)}
    trains = any(trained.values())
    lorica.detach(root, name)
    try:
        attach_finite(root, new, name, trainable=trains)
    except Exception:
        attach_finite(root, old, name, trainable=trains)
        raise
    finally:
        lorica.active(root, active)
        for place, parameter in _parameters(root, name):
            parameter.requires_grad_(trained.get(place, trains))


def _parameters(root: nn.Module, name: str) -> Iterator[tuple[tuple[str, int], Parameter]]:
    """An adapter's A and B, each by its layer and its place there."""
    for path, layer in lora_layers(root).items():
        if name in layer.scaling:
            for i, parameter in enumerate(layer.factor_parameters(name)):
                yield (path, i), parameter


def _at_rank(adapter: Adapter, rank: int) -> Adapter:
    """The same adapter padded with zeros to a rank; its scale stays."""
    for path, f in adapter.factors.items():
        if rank % _groups(f):
            raise AdapterError(
                f"Trying to pad a Conv{f.A.dim() - 2}d LoRA adapter with groups={_groups(f)} to target rank "
                f"{rank}, but the target rank is not divisible by {_groups(f)}. Please choose a target rank "
                f"that is divisible by {_groups(f)}. The convolution is {path}"
            )
    config = adapter.lora
    if config.loftq_config is not None and config.loftq_config.loftq_iter > 1:
        raise AdapterError(
            f"in its rounds after the first LoftQ quantized the base to suit r={config.r}, so the adapter "
            f"cannot be filled up; make it with r={rank}"
        )
    factors = {
        path: dataclasses.replace(f, A=A, B=B)
        for path, f in adapter.factors.items()
        for A, B in [_at(f, rank)]
    }
    scales = {path: config.scale(path) for path in factors}
    power = 0.5 if config.use_rslora else 1.0
    alphas = {path: scale * rank**power for path, scale in scales.items()}
    common = max(alphas.values(), key=list(alphas.values()).count)
    patterns = {exactly(path): alpha for path, alpha in alphas.items() if alpha != common}
    # It has already started, and its kind of start may not allow this rank.
    start = config.init_lora_weights if changes_base(config.init_lora_weights) else True
    config = config.replace(init_lora_weights=start).replace(
        r=rank,
        lora_alpha=common,
        rank_pattern=dict.fromkeys(config.rank_pattern, rank),
        alpha_pattern=patterns,
    )
    return dataclasses.replace(adapter, config=config, factors=factors, trained_as=None)


def _groups(factors: Factors) -> int:
    """Groups of a convolution: each has its own rows of A, and B sees those alone; 1 for any other layer."""
    return factors.r // factors.B.shape[1]


def _at(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, ...) and B (d_out, rank / groups, ...), padded with zeros."""
    groups = _groups(factors)
    A = factors.A.unflatten(0, (groups, -1))
    return _padded(A, 1, rank // groups).flatten(0, 1), _padded(factors.B, 1, rank // groups)


def _padded(factor: Tensor, dim: int, size: int) -> Tensor:
    missing = size - factor.shape[dim]
    if missing == 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)
