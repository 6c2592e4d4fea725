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


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"),
        LoraConfig(r=2, target_modules=["up"], bias="all"),
        LoraConfig(r=2, target_modules=["attention"]),
        LoraConfig(r=2, target_modules=["down"], modules_to_save=["head"]),
    ],
    ids=["start", "biases", "attention", "head"],
)
def test_the_active_adapter_acts_on_no_row_that_does_not_name_it(config: LoraConfig) -> None:
    model: Any = Toy()
    model.attention = nn.MultiheadAttention(6, 1, batch_first=True)
    model.norm.register_forward_pre_hook(lambda _, args: model.attention(*args * 3)[0])
    base = model(tokens())
    lorica.adapt(model, LoraConfig(r=2, target_modules=["down"], init_lora_weights=False), "one")
    lorica.adapt(model, config, "other")
    shake(model)
    other = model(tokens())
    with lorica.active(model, "one"):
        one = model(tokens())
    assert not torch.allclose(other, base)
    with lorica.mixed(model, [None, "one", None]):
        torch.testing.assert_close(model(tokens()), torch.stack([base[0], one[1], base[2]]))
    assert torch.equal(model(tokens()), other)


def test_a_choice_for_all_rows_ends_the_mixture_and_gives_it_back() -> None:
    model = Toy()
    for name in ("one", "two"):
        lorica.adapt(model, LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), name)
    two = model(tokens())
    lorica.mixed(model, ["one", None, "two"])
    mixture = model(tokens())
    with lorica.active(model, "two"):
        assert torch.equal(model(tokens()), two)
    assert torch.equal(model(tokens()), mixture)
    lorica.adapt(model, LoraConfig(r=2, target_modules=["down"], init_lora_weights=False), "three")
    three = model(tokens())
    with lorica.mixed(model, ["three", "three", "three"]):
        torch.testing.assert_close(model(tokens()), three)


def test_a_mixture_goes_on_when_another_adapter_is_attached() -> None:
    model = lorica.adapt(Toy(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), "one")
    value = lorica.extract(model)
    with lorica.mixed(model, ["one", None, None]):
        mixture = model(tokens())
        lorica.attach(model, value, "late")
        assert torch.equal(model(tokens()), mixture)


def test_an_adapter_on_other_layers_may_come_after_a_mixture() -> None:
    model = lorica.adapt(Toy(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), "one")
    with lorica.mixed(model, ["one", None, None]):
        model(tokens())
    lorica.adapt(model, LoraConfig(r=2, target_modules=["down"], init_lora_weights=False), "two")
    alone = model(tokens())
    with lorica.mixed(model, ["two", None, "two"]):
        torch.testing.assert_close(model(tokens())[[0, 2]], alone[[0, 2]])


def test_a_mixture_cannot_be_left_while_merged() -> None:
    model = lorica.adapt(Toy(), LoraConfig(r=2, target_modules=["up"], bias="all"), "one")
    shake(model)
    with pytest.raises(StateError, match="while 'one' is merged"), lorica.mixed(model, [None]):
        lorica.merge(model, "one")


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


def test_batches_of_other_lengths() -> None:
    model = lorica.adapt(
        Toy(), LoraConfig(r=2, target_modules=["up", "embed"], init_lora_weights=False), "one"
    ).eval()
    with torch.no_grad(), lorica.mixed(model, ["one", None]):
        for length in (7, 2, 1, 5):
            x = tokens()[:2, :length]
            together = model(x)
            with lorica.active(model, "one"):
                torch.testing.assert_close(together[0], model(x)[0])
            with lorica.disabled(model):
                torch.testing.assert_close(together[1], model(x)[1])
