"""Sets of adapters acting together on one layer, of every kind and in every mode, against a dense weight.

What the layer must compute is the base with ``W0 + Σ (Wᵢ − W0)``, where Wᵢ is the weight that adapter i alone
makes: ``W0 + s·B·A``, for DoRA its rows at their trained magnitudes, for a start that was taken out of W0 the
rest with the trained product. All in float64, outputs and gradients.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from dense import TAKEN_OUT, Dense, layers_of, slots_of
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from kinds import KINDS, Kind
from tiny import record
from torch import Tensor, nn

import lorica
from lorica.config import AdapterConfig
from lorica.errors import AdapterError, StateError
from lorica.methods import BitFitConfig, FullConfig
from lorica.model.merging.merged import behind_merge
from lorica.state import adapted as roster_of

NAMES = ("one", "two", "three")
# Making a failure smaller takes longer than reading it.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
EXAMPLES = 300 if os.environ.get("LORICA_EXPLORE") else 10


INITS = (False, "orthogonal", *TAKEN_OUT)


@st.composite
def adapters(draw: st.DrawFn, kind: Kind) -> list[AdapterConfig]:
    """One to three adapters of any make that the kind can carry, and that can act together."""
    made: list[AdapterConfig] = []
    replaces = False
    for _ in range(draw(st.integers(1, 3))):
        method = draw(st.sampled_from(["lora", "lora", "lora", "dora", "dora", "bitfit", "full"]))
        if method == "bitfit":
            if kind.biases:
                made.append(BitFitConfig())
            continue
        if method == "full" and kind is not KINDS["own forward"]:
            made.append(FullConfig())
            continue
        inits = [i for i in INITS if not i or (kind.decomposes and not (replaces and i in TAKEN_OUT))]
        init = draw(st.sampled_from(inits))
        replaces |= init in TAKEN_OUT
        given: dict[str, Any] = {
            "r": draw(st.sampled_from([2, 4] if init == "orthogonal" else [1, 2, 3])),
            "lora_alpha": draw(st.sampled_from([1, 3, 4])),
            "use_rslora": draw(st.booleans()),
            "target_modules": [*kind.targets],
            "init_lora_weights": init,
            "use_dora": method == "dora",
        }
        if kind.biases and not kind.read and method == "lora" and init is False:
            given["lora_bias"] = draw(st.booleans())
        made.append(lorica.LoraConfig(**given))
    assume(sum(isinstance(config, lorica.LoraConfig) for config in made) > 0)
    return made


def trained(model: nn.Module, name: str) -> list[Tensor]:
    """Everything that one adapter trains."""
    _, state = roster_of(model)
    own: list[Tensor] = [*slots_of(state, name).values()]
    for _, layer in layers_of(model, name):
        more = (layer.magnitude_parameter(name), layer.bias_parameter(name))
        own += [*layer.factor_parameters(name), *(p for p in more if p is not None)]
    return own


def build(kind: Kind, configs: Sequence[AdapterConfig], *, shaken: bool = True) -> tuple[nn.Module, Dense]:
    """A model that carries the adapters, each trained a little, and its judge."""
    torch.manual_seed(1)
    model = kind.make().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    dense = Dense(model)
    for name, config in zip(NAMES, configs, strict=False):
        lorica.adapt(model, config, name, seed=len(name))
        dense.noticed(model, name)
        if shaken:
            with torch.no_grad():
                for parameter in trained(model, name):
                    parameter += 0.2 * torch.randn_like(parameter)
    return model, dense


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def gradients(y: Tensor, asked: Sequence[Tensor], along: Tensor) -> list[Tensor]:
    """Of ``y · along``; zeros for what has no part in it."""
    return list(
        torch.autograd.grad(y, asked, along, retain_graph=True, allow_unused=True, materialize_grads=True)
    )


def check(model: nn.Module, dense: Dense, x: Tensor, names: Sequence[str], *, merged: bool = False) -> None:
    """Outputs in every mode, and the gradients of all that acts."""
    for training in (True, False):
        model.train(training)
        dense.base.train(training)
        inputs = x.detach().clone().requires_grad_() if x.is_floating_point() else x
        y = model(inputs)
        if merged:
            with behind_merge(model):
                want = dense(model, inputs, names=names)
        else:
            want = dense(model, inputs, names=names)
        close(y, want)
        asked = [inputs] if inputs.requires_grad else []
        asked += [] if merged else [p for name in names for p in trained(model, name)]
        if asked and y.requires_grad:
            along = torch.randn_like(y)
            close(gradients(y, asked, along), gradients(want, asked, along))
        with torch.no_grad():
            close(model(x), want)


def refused(names: Sequence[str], configs: dict[str, AdapterConfig]) -> bool:
    """Whether more than one of these brings its own version of one parameter."""
    taken_out = [
        n
        for n in names
        if isinstance(c := configs[n], lorica.LoraConfig) and c.init_lora_weights in TAKEN_OUT
    ]
    full = [n for n in names if isinstance(configs[n], FullConfig)]
    biases = [n for n in names if isinstance(configs[n], BitFitConfig)]
    return len(full) > 1 or len(biases) > 1 or bool(full and (biases or taken_out)) or len(taken_out) > 1


@pytest.mark.parametrize("case", KINDS)
@settings(
    max_examples=EXAMPLES,
    report_multiple_bugs=False,
    phases=PHASES,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_any_set_in_any_mode(case: str, data: st.DataObject) -> None:
    kind = KINDS[case]
    configs = data.draw(adapters(kind))
    names = NAMES[: len(configs)]
    model, dense = build(kind, configs)
    x = kind.x()
    acting = [n for n in names if data.draw(st.booleans(), label=n)] or [names[0]]
    if refused(acting, lorica.adapters(model)):
        with pytest.raises(AdapterError, match="cannot act together"):
            lorica.active(model, acting)
        acting = [names[0]]
    lorica.active(model, acting)
    check(model, dense, x, acting)
    with lorica.disabled(model):
        check(model, dense, x, [])
    if not all(isinstance(lorica.adapters(model)[n], lorica.LoraConfig) for n in acting):
        acting = [n for n in acting if isinstance(lorica.adapters(model)[n], lorica.LoraConfig)]
        lorica.active(model, acting)
    if not acting:
        return
    before = record(model)
    report = lorica.merge(model)
    assert report.worst[1] < 1e-9
    check(model, dense, x, acting, merged=True)
    for name in names:
        if isinstance(lorica.adapters(model)[name], lorica.LoraConfig):
            lorica.switch(model, name)
            check(model, dense, x, [name], merged=True)
    lorica.restore(model)
    assert record(model) == before
    check(model, dense, x, acting)


@pytest.mark.parametrize("case", KINDS)
def test_dora_beside_full_fine_tuning(case: str) -> None:
    kind = KINDS[case]
    lora = lorica.LoraConfig(r=2, target_modules=[*kind.targets], use_dora=True, init_lora_weights=False)
    model, dense = build(kind, [FullConfig(), lora])
    lorica.active(model, ["one", "two"])
    if case == "own forward":  # lorica does not know what another weight gives there
        with pytest.raises(StateError, match="has a forward of its own"):
            model(kind.x())
        return
    check(model, dense, kind.x(), ["one", "two"])


@pytest.mark.parametrize("case", [name for name, kind in KINDS.items() if not kind.read])
@settings(
    max_examples=EXAMPLES,
    report_multiple_bugs=False,
    phases=PHASES,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_any_adapter_for_each_row(case: str, data: st.DataObject) -> None:
    kind = KINDS[case]
    configs = data.draw(adapters(kind))
    model, dense = build(kind, configs)
    _, state = roster_of(model)
    can = [name for name in NAMES[: len(configs)] if not state.stand_ins(name)]
    assume(can)
    x = kind.x()
    names = [data.draw(st.sampled_from([None, *can])) for _ in range(len(x))]
    want = torch.cat(
        [dense(model, x[i : i + 1], names=[] if name is None else [name]) for i, name in enumerate(names)]
    )
    model.train(data.draw(st.booleans()))
    with lorica.mixed(model, names):
        y = model(x)
        close(y, want)
        with torch.no_grad():
            close(model(x), want)
    asked = [p for name in dict.fromkeys(names) if name is not None for p in trained(model, name)]
    if asked:
        along = torch.randn_like(y)
        close(gradients(y, asked, along), gradients(want, asked, along))


@pytest.mark.parametrize("case", [name for name, kind in KINDS.items() if kind.decomposes])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_untrained_start_changes_nothing_beside_others(case: str, init: str) -> None:
    kind = KINDS[case]
    common: dict[str, Any] = {"r": 2, "target_modules": [*kind.targets]}
    others = [
        lorica.LoraConfig(**common, use_dora=True, init_lora_weights=False),
        lorica.LoraConfig(**common, init_lora_weights=False),
    ]
    model, _ = build(kind, others)
    x = kind.x()
    lorica.active(model, NAMES[:2])
    y = model(x)
    lorica.adapt(model, lorica.LoraConfig(**common, init_lora_weights=init), "three", seed=0)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        lorica.active(model, NAMES)
        close(model(x), y)
        lorica.merge(model)
        close(model(x), y)
        lorica.switch(model, "three")
        alone = model(x)
        lorica.restore(model)
        with lorica.disabled(model):
            close(alone, model(x))
        close(model(x), y)
