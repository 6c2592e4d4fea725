"""Every architecture of transformers: adapted, merged and by definition it computes the same, gradients too.

    W0 + scale·B·A in every layer that can be adapted  ──  outputs and gradients of A and B in float64

In the suite those that differ in kind; with LORICA_EXPLORE=1 all that a tiny model can be made of.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from architectures import ALL, Unbuilt, flat, outputs, running
from oracle import folded
from torch import nn
from torch.func import functional_call

import lorica
from lorica.check import layer_class
from lorica.errors import TargetError
from lorica.find import as_target
from lorica.layers import LoraLayer
from lorica.pieces.plugins.looked_up import check_looked_up
from lorica.tree import Place, walk

CONFIG = lorica.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)

# What each stands for: a weight read past its layer, a forward of its own, a table that is added whole, a
# tied one, convolutions, stacks of experts, fused attention, an encoder with a decoder.
SAMPLE = [
    ("base", "mamba"),
    ("base", "jamba"),
    ("base", "falcon_mamba"),
    ("base", "llama4_text"),
    ("base", "phimoe"),
    ("base", "deepseek_v4"),
    ("base", "ibert"),
    ("base", "prophetnet"),
    ("base", "voxtral_realtime_encoder"),
    ("base", "qwen2_audio_encoder"),
    ("base", "clip"),
    ("base", "wavlm"),
    ("base", "layoutlmv3"),
    ("base", "gemma3n_text"),
    ("base", "t5"),
    ("base", "whisper"),
    ("base", "bit"),
    ("base", "florence2"),
    ("lm", "bloom"),
    ("lm", "gpt2"),
    ("lm", "mixtral"),
    ("lm", "qwen3_next"),
    ("lm", "olmoe"),
    ("lm", "llama"),
]


def accepted(model: nn.Module) -> list[str]:
    """Paths of all modules that lorica would adapt, without those that it refuses by name."""
    places = list(walk(model))
    paths = []
    for place in places:
        if not place.path or layer_class(place.module, place.parent) is None:
            continue
        if getattr(place.module, "groups", 1) > 1:
            continue  # no merged weight can hold the update of a grouped convolution
        if (why := refused(place, places)) is None:
            paths.append(place.path)
        else:
            assert place.path in why
    return paths


def refused(place: Place, places: list[Place]) -> str | None:
    try:
        as_target(place, CONFIG)
        check_looked_up(places, [place.path])
    except TargetError as error:
        return str(error)
    return None


def mergeable(layer: Any) -> bool:
    try:
        layer.check_mergeable()
    except lorica.LoricaError:
        return False  # refused by name where the adapter is merged
    return True


def check(head: str, name: str) -> None:
    model, inputs = running(head, name)
    before = copy.deepcopy(model)
    base = outputs(model, inputs).detach()
    config = CONFIG.replace(target_modules=accepted(model))
    lorica.adapt(model, config, seed=0)
    unmerged = [p for p, m in model.named_modules() if isinstance(m, LoraLayer) and not mergeable(m)]
    if unmerged:
        lorica.detach(model)
        if len(unmerged) == len(config.target_modules or []):
            return
        config = config.replace(target_modules=[p for p in config.target_modules or [] if p not in unmerged])
        lorica.adapt(model, config, seed=0)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}

    out = outputs(model, inputs)
    weights = folded(model, before)
    torch.manual_seed(0)
    expected = flat(functional_call(before, weights, (), inputs, tie_weights=False))
    change = (expected - base).abs().max()
    assert change > 1e-3, "the update does nothing: the comparison would prove nothing"
    assert (out - expected).abs().max() < 1e-6 * change

    names = [
        (path, factor)
        for path, layer in layers.items()
        for _, _, holder in layer.holders("default")
        for factor in holder.factor_parameters("default")
    ]
    factors = [factor for _, factor in names]
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(out, factors, direction, allow_unused=True)
    right = torch.autograd.grad(expected, factors, direction, allow_unused=True)
    for (path, factor), one, other in zip(names, got, right, strict=True):
        given: list[Any] = [one, other]  # None where nothing came
        one, other = (torch.zeros_like(factor) if g is None else g for g in given)
        # Longformer's own gradients are NaN behind rows of padding alone.
        assert torch.equal(one.isfinite(), other.isfinite()), f"gradient of {path}"
        one, other = one.nan_to_num(), other.nan_to_num()
        scale = max(float(other.abs().max()), 1e-6)
        if getattr(layers[path], "padding_idx", None) is None:
            assert (one - other).abs().max() < 1e-5 * scale, f"gradient of {path}"
        else:  # the row of the padding has a gradient in one of the two only
            assert one.any() or not other.any(), f"gradient of {path}"

    lorica.merge(model)
    assert (outputs(model, inputs) - expected).abs().max() < 1e-6 * change
    lorica.restore(model)
    lorica.detach(model)
    assert torch.equal(outputs(model, inputs), base)


@pytest.mark.parametrize(("head", "name"), ALL if os.environ.get("LORICA_EXPLORE") else SAMPLE)
@pytest.mark.filterwarnings("ignore")
def test_adapted_merged_and_by_definition_an_architecture_computes_the_same(head: str, name: str) -> None:
    if not os.environ.get("LORICA_EXPLORE"):
        check(head, name)
        return
    try:
        check(head, name)
    except Unbuilt as reason:
        pytest.skip(str(reason))
