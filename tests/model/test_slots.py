"""Adapters in slots: each token of a packed row gets what its adapter gives it alone."""

from __future__ import annotations

import copy
from itertools import accumulate, chain
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lorica
from lorica.layers.slots import plan as plans
from lorica.model.slots import Slots

CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"r": 8, "target_modules": "all-linear"},
    "some": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 2, "use_rslora": True, "target_modules": ["up_proj", "down_proj"]},
    "wide": {"r": 12, "target_modules": ["q_proj", "gate_proj"], "rank_pattern": {"gate_proj": 3}},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "o_proj"]},
    "biased": {"r": 4, "lora_bias": True, "target_modules": ["k_proj", "down_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "v_proj"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "copies": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 7]},
}
GPT2: dict[str, dict[str, Any]] = {
    "all": {"r": 8, "target_modules": "all-linear"},
    "biases": {"r": 4, "target_modules": ["c_attn"], "bias": "all"},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_proj"]},
    "table": {"r": 4, "target_modules": ["wte", "c_fc"]},
}


def trained(model: nn.Module, config: dict[str, Any]) -> lorica.Adapter:
    """An adapter that changes everything it can."""
    lorica.adapt(model, lorica.LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    value = copy.deepcopy(lorica.extract(model))
    lorica.detach(model)
    return value


def alone(model: nn.Module, adapter: lorica.Adapter | None, ids: list[int]) -> Tensor:
    """The logits of one sequence with one adapter, by the layers that `lorica.attach` makes."""
    if adapter is not None:
        lorica.attach(model, adapter)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    if adapter is not None:
        lorica.detach(model)
    return logits


def packed(model: nn.Module, sequences: list[list[int]], keep: Tensor | None = None) -> Tensor:
    """The logits of sequences in one row, which see each other no more than they would alone."""
    lengths = [len(s) for s in sequences]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    seen = (owner[:, None] == owner[None]) & (positions[:, None] >= positions[None])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    given = {} if keep is None else {"logits_to_keep": keep}
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([list(chain(*sequences))]),
            position_ids=positions[None],
            attention_mask=mask[None, None],
            **given,
        ).logits[0]


@pytest.mark.parametrize(("name", "configs"), [("llama", CONFIGS), ("gpt2", GPT2)])
@pytest.mark.parametrize("way", ["masked", "stacked", "long"])
def test_each_token_gets_what_its_adapter_gives_it_alone(
    name: str, configs: dict[str, dict[str, Any]], way: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plans, "LONG", {"masked": 99, "stacked": 99, "long": 2}[way])
    monkeypatch.setattr(plans, "MASKED", {"masked": 999, "stacked": 0, "long": 16}[way])
    model = tiny.transformer(name).eval()
    before = tiny.record(model)
    adapters = {key: trained(model, config) for key, config in configs.items()}
    # Two requests of each adapter, and some of the base, in an order that keeps no adapter's together.
    owners = [*adapters, None, *reversed(adapters), None]
    sequences = [torch.randint(3, tiny.VOCABULARY, (1 + i % 5,)).tolist() for i in range(len(owners))]
    expected = [
        alone(model, None if owner is None else adapters[owner], ids)
        for owner, ids in zip(owners, sequences, strict=True)
    ]
    slots = Slots(model, len(adapters))
    places = {key: slots.mount(slots.fit(adapter)) for key, adapter in adapters.items()}
    runs = [(places.get(o) if o else None, len(ids)) for o, ids in zip(owners, sequences, strict=True)]
    slots.choose(runs)
    torch.testing.assert_close(packed(model, sequences), torch.cat(expected), atol=2e-6, rtol=1e-5)

    # The head is given the last token of every request, and the first again, as padding is.
    last = torch.tensor([0, *(end - 1 for end in accumulate(map(len, sequences)))])
    heads = [(runs[0][0], 1), *((place, 1) for place, _ in runs)]
    slots.choose(runs, heads)
    torch.testing.assert_close(
        packed(model, sequences, last), torch.cat(expected)[last], atol=2e-6, rtol=1e-5
    )
    slots.close()
    assert tiny.record(model) == before


@pytest.mark.parametrize("masked", [999, 0])
def test_an_adapter_that_overflows_spoils_no_other_s_tokens(masked: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plans, "MASKED", masked)
    model = tiny.transformer("llama").eval()
    good, bad = trained(model, CONFIGS["all"]), trained(model, CONFIGS["all"])
    for factors in bad.factors.values():
        factors.A.fill_(1e38)
    slots = Slots(model, 2)
    places = [slots.mount(slots.fit(own)) for own in (bad, good)]
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(5, layer.in_features)
    y, factors = layer(x), good.factors["model.layers.0.mlp.up_proj"]
    slots.choose([(places[0], 5), (places[1], 5), (None, 5)])
    found = layer(torch.cat([x, x, x])).split(5)
    assert not found[0].isfinite().all()
    scale = good.lora.lora_alpha / good.lora.r
    torch.testing.assert_close(found[1], y + scale * x @ factors.A.T @ factors.B.T)
    torch.testing.assert_close(found[2], y)


def test_what_overflows_when_it_is_cast_is_refused():
    model = tiny.transformer("llama").eval()
    adapter = trained(model, CONFIGS["all"])
    for factors in adapter.factors.values():
        factors.B.fill_(1e5)
    with pytest.raises(lorica.LoricaError, match=r"is not finite in torch\.float16"):
        Slots(model.half()).fit(adapter)


def test_a_slot_taken_again_holds_nothing_of_the_adapter_before():
    model = tiny.transformer("llama").eval()
    first, second = trained(model, CONFIGS["all"]), trained(model, CONFIGS["some"] | {"r": 8})
    ids = [3, 4, 5, 6, 7]
    slots = Slots(model, 2)
    other = slots.mount(slots.fit(trained(model, CONFIGS["copies"])))
    place = slots.mount(slots.fit(first))
    slots.choose([(place, 5)])
    packed(model, [ids])
    slots.unmount(place)
    place = slots.mount(slots.fit(second))
    slots.choose([(place, 5)])
    torch.testing.assert_close(packed(model, [ids]), alone_beside(model, second, ids))
    with pytest.raises(lorica.LoricaError, match="all 2 slots are taken"):
        slots.mount(slots.fit(first))
    slots.unmount(other)
    slots.mount(slots.fit(first))


def alone_beside(model: nn.Module, adapter: lorica.Adapter, ids: list[int]) -> Tensor:
    """As `alone`, of a fresh copy of the model."""
    return alone(tiny.transformer("llama").eval(), adapter, ids)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("mixtral", {"target_parameters": ["experts.gate_up_proj"]}, "cannot be served beside other"),
        ("llama", {"r": 80, "target_modules": ["q_proj"]}, "rank is 80, and at most 64"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, r"mlp \(LlamaMLP\)"),
    ],
)
def test_what_cannot_differ_by_token_is_refused_by_name(name: str, config: dict[str, Any], said: str):
    model = tiny.transformer(name).eval()
    adapter = trained(model, config)
    before = tiny.record(model)
    with pytest.raises(lorica.LoricaError, match=said):
        Slots(model).fit(adapter)
    assert tiny.record(model) == before


def test_packed_weights_stay_as_the_adapter_was_trained_beside_them():
    kind: Any = pytest.importorskip("bitsandbytes", reason="pip install 'lorica[quantized]'").nn.Linear4bit
    model = tiny.transformer("llama", hidden_size=64, intermediate_size=64).eval()
    for path, layer in list(model.named_modules()):
        if path.endswith("_proj"):
            own = kind(*layer.weight.T.shape, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            own.load_state_dict({"weight": layer.weight.detach()})
            model.set_submodule(path, own.to("cpu").eval())
    adapter, ids = trained(model, CONFIGS["all"]), [5, 6, 7, 8]
    expected = alone(model, adapter, ids)
    slots = Slots(model)
    slots.choose([(slots.mount(slots.fit(adapter)), 4)])
    torch.testing.assert_close(packed(model, [ids]), expected, atol=1e-6, rtol=1e-6)
    slots.close()


def test_an_adapter_of_another_base_is_refused_with_the_whole_list():
    adapter = trained(tiny.transformer("gpt2").eval(), GPT2["all"])
    with pytest.raises(lorica.LoricaError, match=r"unexpected: transformer\.h\.0\.attn\.c_attn"):
        Slots(tiny.transformer("llama").eval()).fit(adapter)


def test_tokens_that_lie_together_are_multiplied_where_they_are():
    model = tiny.transformer("llama").eval()
    adapters = [trained(model, CONFIGS["all"] | {"r": r}) for r in (8, 5, 2)]
    sequences = torch.randint(3, tiny.VOCABULARY, (5, 2)).tolist()
    expected = [alone(model, own, ids) for own, ids in zip([None, *adapters, None], sequences, strict=True)]
    slots = Slots(model)
    runs = [(None, 2), *((slots.mount(slots.fit(own)), 2) for own in adapters), (None, 2)]
    slots.choose(runs)
    (group,) = plans.Plan(runs).groups
    assert group.short is not None
    assert group.short.span == (2, 8)
    torch.testing.assert_close(packed(model, sequences), torch.cat(expected), atol=2e-6, rtol=1e-5)
