"""Adapter layers: where they stand, what they compute, and what of the model stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from methods.common import ARCHITECTURES, check_refuses_merge, check_round_trip, trained_names
from tiny import Toy, adapted, batch, outputs, record, shake, transformer
from torch import Tensor
from torch.nn import functional as F

import lorica
from lorica.config import MethodConfig
from lorica.errors import AdapterError, ConfigError, TargetError

H, L, P = (c(bottleneck=3) for c in (lorica.AdapterHConfig, lorica.AdapterLConfig, lorica.AdapterPConfig))
D = lorica.AdapterDConfig(bottleneck=3, dropped=1)
METHODS = {config.method: config for config in (H, L, P, D)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "opt"])
def test_round_trip(name: str, method: str, tmp_path: Path) -> None:
    check_round_trip(name, METHODS[method], tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_merge_and_mixed_refuse_by_name(method: str) -> None:
    check_refuses_merge("bert", METHODS[method])
    model = lorica.adapt(transformer("bert"), METHODS[method])
    with pytest.raises(AdapterError, match=method):
        lorica.mixed(model, ["default", None, None])


def bottleneck(value: lorica.Adapter, path: str, x: Tensor, act: str) -> Tensor:
    """The oracle: ``up(act(down(x)))``, under the norm where there is one."""
    t = {
        k.removeprefix(f"{path}.bottleneck."): v for k, v in value.added.items() if k.startswith(f"{path}.b")
    }
    if "norm.weight" in t:
        x = F.layer_norm(x, x.shape[-1:], t["norm.weight"], t["norm.bias"])
    inside = {"relu": torch.relu, "gelu": F.gelu}[act](x @ t["down.weight"].T + t["down.bias"])
    return inside @ t["up.weight"].T + t["up.bias"]


@torch.no_grad()
def test_bert_with_adapters_written_out() -> None:
    for config in (H, L, P, D):
        model = adapted(transformer("bert"), config)
        value = lorica.extract(model)
        base = transformer("bert")
        x = base.embeddings(batch()["input_ids"])
        for i, layer in enumerate(base.encoder.layer):
            path = f"encoder.layer.{i}"
            inside = layer.attention.self(x)[0]
            a = layer.attention.output.dense(inside)
            if config is H:
                a = a + bottleneck(value, f"{path}.attention.output.dropout", a, "gelu")
            x = layer.attention.output.LayerNorm(a + x)
            m = layer.output.dense(layer.intermediate(x))
            if config is H:
                m = m + bottleneck(value, f"{path}.output.dropout", m, "gelu")
            z = m + x
            x = layer.output.LayerNorm(z)
            if config is P or (config is D and i >= 1):
                x = layer.output.LayerNorm(z + bottleneck(value, f"{path}.output.LayerNorm", x, "relu"))
            if config is L:
                x = x + bottleneck(value, path, x, "relu")
        assert torch.allclose(outputs(model), x, atol=1e-5)


@torch.no_grad()
def test_gpt2_with_adapters_written_out() -> None:
    for config in (H, L, P, D):
        model = adapted(transformer("gpt2"), config)
        value = lorica.extract(model)
        base = transformer("gpt2")
        tokens = batch()["input_ids"]
        x = base.transformer.wte(tokens) + base.transformer.wpe(torch.arange(tokens.shape[1]))
        for i, block in enumerate(base.transformer.h):
            path = f"transformer.h.{i}"
            a = causal_attention(block.attn, block.ln_1(x))
            if config is H:
                a = a + bottleneck(value, f"{path}.attn", a, "gelu")
            x = x + a
            m = block.mlp(block.ln_2(x))
            if config is H:
                m = m + bottleneck(value, f"{path}.mlp", m, "gelu")
            x = x + m
            if config in (L, P) or (config is D and i >= 1):
                x = x + bottleneck(value, path, x, "relu")
        assert torch.allclose(outputs(model, "gpt2"), base.lm_head(base.transformer.ln_f(x)), atol=1e-5)


def causal_attention(attention: torch.nn.Module, x: Tensor) -> Tensor:
    """GPT-2's attention, from its weights."""
    q, k, v = (
        part.unflatten(-1, (2, -1)).transpose(1, 2)
        for part in attention.c_attn(x).split(x.shape[-1], -1)  # type: ignore[operator]
    )
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention.c_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[operator]


def test_where_they_stand() -> None:
    def places(name: str, config: MethodConfig, **settings: Any) -> set[str]:
        trained = trained_names(lorica.adapt(transformer(name, **settings), config))
        assert all(".bottleneck.default." in n for n in trained)
        return {n.split(".bottleneck.")[0] for n in trained}

    assert places("distilbert", P) == {f"distilbert.transformer.layer.{i}.output_layer_norm" for i in (0, 1)}
    assert places("vit", H) == {f"vit.layers.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")}
    assert places("llama", H) == {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")}
    decoder = {f"decoder.block.{i}.layer.{j}.dropout" for i in (0, 1) for j in (0, 1, 2)}
    assert places("t5", H) == decoder | {
        f"encoder.block.{i}.layer.{j}.dropout" for i in (0, 1) for j in (0, 1)
    }
    assert places("bloom", H) == {
        f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("self_attention.dense", "mlp.dense_4h_to_h")
    }
    halves = [f"model.{half}.layers.{i}" for half in ("encoder", "decoder") for i in (0, 1)]
    assert places("bart", P) == {f"{block}.final_layer_norm" for block in halves}
    assert places("opt", P) == {f"model.decoder.layers.{i}" for i in (0, 1)}
    assert places("opt", P, do_layer_norm_before=False) == {
        f"model.decoder.layers.{i}.final_layer_norm" for i in (0, 1)
    }
    assert places("bert", D) == {"encoder.layer.1.output.LayerNorm"}


def test_below_the_lowest_adapter_nothing_goes_backward() -> None:
    model = lorica.adapt(transformer("bert"), D)
    states = model(**batch(), output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in states] == [False, False, True]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_in_bfloat16_the_parts_are_float32(name: str) -> None:
    model = lorica.adapt(transformer(name, dtype=torch.bfloat16), L)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shake(model)
    assert outputs(model, name).dtype == torch.bfloat16


def test_the_start_depends_on_seed_and_place_alone() -> None:
    one, other = (lorica.extract(lorica.adapt(transformer("bert"), c, seed=3)) for c in (P, D))
    key = "encoder.layer.1.output.LayerNorm.bottleneck.down.weight"
    assert torch.equal(one.added[key], other.added[key])
    again = lorica.extract(lorica.adapt(transformer("bert"), P, seed=4))
    assert not torch.equal(one.added[key], again.added[key])


def test_beside_lora() -> None:
    lora = lorica.LoraConfig(r=2, target_modules="all-linear")
    model = transformer("bert")
    before = record(model)
    lorica.adapt(model, [lora, H], seed=0)
    shake(model)
    both = outputs(model)
    value = lorica.extract(model)
    assert value.factors
    assert value.added
    assert torch.equal(outputs(lorica.attach(transformer("bert"), value)), both)
    lorica.detach(model)
    assert record(model) == before
    # Apart, one may act without the other; and LoRA merges while the bottlenecks stand by.
    lorica.adapt(model, H, "bottleneck")
    lorica.adapt(model, lora, "lora")
    shake(model)
    alone = outputs(model)
    lorica.merge(model, "lora")
    assert torch.allclose(outputs(model), alone, atol=1e-4)
    lorica.restore(model)
    lorica.active(model, ["lora", "bottleneck"])
    assert not torch.allclose(outputs(model), alone)
    lorica.detach(model)
    assert record(model) == before


def test_where_another_has_its_place() -> None:
    model = lorica.adapt(transformer("opt"), lorica.LoraConfig(target_modules=["fc2"]), "lora")
    with pytest.raises(TargetError, match=r"fc2 is a Lora\w+ for another adapter"):
        lorica.adapt(model, H, "bottleneck")
    other = lorica.adapt(transformer("opt"), H, "bottleneck")
    with pytest.raises(TargetError, match="carries a part that another method added"):
        lorica.adapt(other, lorica.LoraConfig(target_modules=["fc2"]), "lora")
    with pytest.raises(TargetError, match="two of the methods add to"):
        lorica.adapt(transformer("gpt2"), [L, P])
    lorica.adapt(other, H, "second")
    with pytest.raises(AdapterError, match="cannot act together"):
        lorica.active(other, ["bottleneck", "second"])


def test_what_cannot_be_used() -> None:
    with pytest.raises(TargetError, match="leaves no adapter in a stack of 2"):
        lorica.adapt(transformer("bert"), lorica.AdapterDConfig(dropped=2))
    with pytest.raises(TargetError, match="no config that says its hidden_size"):
        lorica.adapt(Toy(), H)
    for field, wrong in (("bottleneck", 0), ("activation", "relux"), ("init_std", 0.0), ("dropped", -1)):
        with pytest.raises(ConfigError, match=field):
            lorica.AdapterDConfig(**{field: wrong})  # type: ignore[arg-type]
    assert {config.family for config in (H, L, P, D)} == {"additive"}


def test_stages_of_several_widths_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    swin = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    with pytest.raises(TargetError, match="2 stages of blocks, each with a width of its own"):
        lorica.adapt(transformers.SwinModel(swin), L)
