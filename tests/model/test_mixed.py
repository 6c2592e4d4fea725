"""One adapter for each row, on whole models, `generate` included; and what cannot be mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Toy, shake, tokens, transformer
from torch import nn

import lorica
from lorica import LoraConfig
from lorica.errors import AdapterError, StateError


@pytest.fixture
def writer() -> Any:
    """A small GPT-2 with two adapters of different ranks and targets."""
    model = transformer("gpt2")
    lorica.adapt(model, LoraConfig(r=2, target_modules=["c_attn"]), "one")
    lorica.adapt(model, LoraConfig(r=5, target_modules=["c_attn", "c_fc", "c_proj"]), "two")
    shake(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_each_row_what_its_adapter_alone_writes(writer: Any, beams: int) -> None:
    names = ("two", None, "one", "two")
    prompt = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(1))
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    alone = []
    for row, name in zip(prompt, names, strict=True):
        with lorica.active(writer, [name] if name else []):
            alone.append(writer.generate(row[None], **options))
    with lorica.mixed(writer, names):
        together = writer.generate(prompt, **options)
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row.tolist()) for row in together}) == len(names)


def test_an_unknown_name_is_refused_and_nothing_changes() -> None:
    model = lorica.adapt(Toy(), LoraConfig(r=1, target_modules=["up"]), "one")
    with pytest.raises(AdapterError, match="did you mean 'one'"):
        lorica.mixed(model, ["on"])
    with pytest.raises(AdapterError, match="needs a name"):
        lorica.mixed(model, [])
    assert model(tokens()).shape[1] == 3


def test_trained_biases_are_refused() -> None:
    model = lorica.adapt(Toy(), LoraConfig(r=1, target_modules=["up"], bias="lora_only"), "one")
    with pytest.raises(AdapterError, match=r"blocks\.0\.up\.bias.*cannot differ by row"):
        lorica.mixed(model, ["one", None])


def test_a_fused_attention_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    lorica.adapt(model, LoraConfig(r=1, target_modules=["attention"]), "one")
    with pytest.raises(StateError, match="attention is read past its layer"):
        lorica.mixed(model, ["one"])


def test_a_merged_model_is_refused() -> None:
    model = lorica.adapt(Toy(), LoraConfig(r=1, target_modules=["up"]), "one")
    lorica.merge(model)
    with pytest.raises(StateError, match="restore"):
        lorica.mixed(model, ["one"])


def test_a_prompt_of_its_own_length_for_each_batch() -> None:
    """One `mixed` holds for batches of several sizes, as long as they are multiples of the rows named."""
    model = lorica.adapt(
        Toy(), LoraConfig(r=2, target_modules=["up", "embed"], init_lora_weights=False), "one"
    ).eval()
    x = tokens()[:2]
    with torch.no_grad():
        adapted = model(x)
        with lorica.disabled(model):
            base = model(x)
        with lorica.mixed(model, ["one", None]):
            torch.testing.assert_close(model(x), torch.stack([adapted[0], base[1]]))
            doubled = model(x.repeat_interleave(2, 0))
    torch.testing.assert_close(doubled, torch.stack([adapted[0], adapted[0], base[1], base[1]]))
