"""How an adapter starts on a module: its factors, and what becomes of the module's weight.

A start that is taken out of W0 (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) leaves another weight, which stands in
W0's place while the adapter acts:

    W0 ──▶ (W0 − scale·B₀·A₀) + scale·B·A,   A = A₀ and B = B₀ at the start

W0 itself is set aside and never written to, so that it comes back bit for bit, and another adapter acts on
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica import init
from lorica.config import AdapterConfig, LoraConfig
from lorica.config.inits import BASE_KEPT, FROM_DATA, LoftQConfig, LoraGAConfig, changes_base, niter
from lorica.errors import AdapterError, ConfigError, StateError, TargetError
from lorica.folding import fold, one_thread
from lorica.layers import (
    LoraAttention,
    LoraAttentionOutput,
    LoraConv,
    LoraEmbedding,
    LoraLayer,
    LoraOpaque,
    Uncalled,
)
from lorica.model.structure import Target
from lorica.state import Start

PREPARED = "lorica_prepared"
"""Attribute of a model that was shown data: what its modules' starts are made from."""

Source = init.Oriented | init.Triple
S = TypeVar("S", init.Oriented, init.Triple)
_DRAWN = (True, False, "gaussian")


class Begun(NamedTuple):
    """A and B (float32 or better), and what takes W0's place, if anything does."""

    A: Tensor
    B: Tensor
    start: Start | None = None


def begin(
    target: Target, config: LoraConfig, random: torch.Generator, prepared: Mapping[str, Source]
) -> Begun:
    """The start of an adapter on one module; the module is not touched.

    Args:
        target: the module.
        config: says how to start.
        random: source of all draws, the module's own.
        prepared: module path → what data showed of it, for the starts that are made from that.

    Returns:
        The factors, and the weight to go with them.

    Raises:
        TargetError: such a start is not possible on this kind of module.
        StateError: it needs data that the model was not shown.
    """
    value, path = config.init_lora_weights, target.path
    r = config.rank(target.pattern_path)
    check_start(target, config)
    if value in BASE_KEPT:
        shapes, embedding = target.factor_shapes(r), issubclass(target.layer, LoraEmbedding)
        A, B = init.start(shapes, value, random, embedding=embedding)
        if value == "gaussian":
            A *= A.shape[0] / r  # its deviation is that of one expert's rank
        return Begun(A, B)
    scale, weight = config.scale(path), _precise(target)
    if value == "loftq":
        A, B, base = init.loftq(weight, r, scale, config.loftq_config or LoftQConfig())
        return Begun(_own(A), _own(B), Start(_stored(target, base)))
    if value == "olora":
        A, B = init.olora(weight, r)
    elif value == "corda":
        oriented = _prepared(prepared, init.Oriented, path, config)
        A, B = oriented.factors(scale)
    elif value == "lora_ga":
        triples = _prepared(prepared, init.Triple, path, config)
        settings = config.lora_ga_config or LoraGAConfig()
        A, B = init.lora_ga(triples, r, scale, weight, settings, random)
    else:
        A, B = init.pissa(weight, r, scale, niter=niter(value), random=random)
    return Begun(_own(A), _own(B), taken_out(target, A, B, scale))


def check_alone(lora: LoraConfig, config: AdapterConfig) -> None:
    """Refuse a start that is worked out for LoRA alone in a combination of methods.

    Raises:
        ConfigError: it is.
    """
    value = lora.init_lora_weights
    if config is not lora and (changes_base(value) or value in FROM_DATA):
        raise ConfigError(
            f"init_lora_weights={value!r} is for LoRA alone, not in a combination; make two adapters of "
            "them, or take True"
        )


def again(target: Target, config: AdapterConfig, prepared: Mapping[str, Source]) -> Start | None:
    """What the start of a trained adapter made of W0, for factors that were saved without their start.

    Raises:
        AdapterError: nobody can tell: the start was drawn.
        TargetError: as `begin`.
        StateError: as `begin`.
    """
    if not isinstance(config, LoraConfig) or not changes_base(value := config.init_lora_weights):
        return None
    if niter(value) is not None:
        raise AdapterError(
            f"the adapter was saved as init_lora_weights={value!r} leaves it, without its start, and that "
            "was drawn. Save it where it was trained: with lorica.save, or with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    return begin(target, config, init.generator(0, target.path), prepared).start


def taken_out(target: Target, A: Tensor, B: Tensor, scale: float) -> Start:
    """The start that takes ``scale · B·A`` out of W0. A and B are copied."""
    A, B = _own(A), _own(B)
    return Start(_stored(target, less(target.layer, base_weight(target), A, B, scale)), A, B)


def less(layer: type[LoraLayer], weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``W0 − scale·B·A`` (d_out, d_in) in A's precision, with the same bits on any number of threads."""
    with one_thread():
        return fold(layer.as_matrix(weight.detach()).to(A), B, A, -scale)


def check_start(target: Target, config: LoraConfig) -> None:
    """Refuse a start that is not possible on this module.

    Raises:
        TargetError: naming the module, and what to do.
    """
    value, path, layer = config.init_lora_weights, target.path, target.layer
    if value in _DRAWN:
        return
    what = f"{path}: init_lora_weights={value!r}"
    kind = type(target.module).__name__
    if target.parameter is not None:
        raise TargetError(
            f"{target.pattern_path}: init_lora_weights={value!r} is for linear layers, and this is a "
            "parameter that its module reads itself; leave it out, or take True"
        )
    if issubclass(layer, (LoraEmbedding, LoraConv)):
        raise TargetError(f"{what} is for linear layers, and this is a {kind}; leave it out, or take True")
    if value not in BASE_KEPT and issubclass(layer, LoraOpaque):
        raise TargetError(
            f"{what} starts from W0 itself, and this {kind} packs it or has a forward of its own; adapt the "
            "base before it is quantized, or take True; replace_lora_weights_loftq then starts it by LoftQ "
            "from the unquantized base's files"
        )
    if value in ("eva", "corda", "lora_ga") and issubclass(
        layer, (LoraAttention, LoraAttentionOutput, Uncalled)
    ):
        raise TargetError(
            f"{what} looks at what the layer is given, and this {kind} is read without being called; leave "
            "it out"
        )
    (r, d_in), (d_out, _) = layer.factor_shapes(target.module, config.rank(path))
    needed = 2 * r if value == "lora_ga" else r
    if value != "orthogonal" and needed > min(d_in, d_out):
        raise TargetError(
            f"{what} at r={r} needs {needed} directions, and a weight of {d_out} × {d_in} has "
            f"{min(d_in, d_out)}; choose a smaller rank"
        )


def _own(factor: Tensor) -> Tensor:
    """A copy: what was cut out of a decomposition would keep the whole of it in memory."""
    return factor.detach().clone(memory_format=torch.contiguous_format)


def base_weight(target: Target) -> Parameter:
    """What stands in the module as its weight."""
    weight = target.module._parameters[target.layer.weight_name]
    assert weight is not None
    return weight


def _precise(target: Target) -> Tensor:
    """W0 as (d_out, d_in), in float32 or its own higher precision."""
    weight = base_weight(target).detach()
    return target.layer.as_matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))


def _stored(target: Target, matrix: Tensor) -> Parameter:
    """A matrix (d_out, d_in) as the module stores its weight."""
    weight = base_weight(target)
    matrix = matrix.t() if target.layer.transposed else matrix
    return Parameter(matrix.to(weight.dtype).contiguous(), requires_grad=False)


def _prepared(prepared: Mapping[str, Source], kind: type[S], path: str, config: LoraConfig) -> S:
    value, function = config.init_lora_weights, {"corda": "corda", "lora_ga": "loraga"}
    source = prepared.get(path)
    call = f"lorica.preprocess_{function[str(value)]}(model, config, ...)"
    if not isinstance(source, kind):
        raise StateError(
            f"{path}: init_lora_weights={value!r} starts from what data shows of this layer; call {call} "
            "with this configuration before adapting"
        )
    r, have = config.rank(path), len(source.S) // (2 if value == "lora_ga" else 1)
    if have != r:
        raise StateError(f"{path}: {call} was called for r={have}, and now r={r}; call it again")
    return source


def prepared(root: nn.Module) -> dict[str, Source]:
    """What a model was shown, by module path."""
    return root.__dict__.get(PREPARED, {})
