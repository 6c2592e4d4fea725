"""PreEmbed and PreLayer: what the model sees, what comes out, generation, and the room that is left."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.common import ARCHITECTURES, check_refuses_merge, check_round_trip, trained_names
from tiny import Toy, adapted, batch, outputs, record, shake, transformer

import lorica
from lorica.config import MethodConfig
from lorica.errors import AdapterError, ConfigError, StateError, TargetError

EMBED, LAYER = lorica.PreEmbedConfig(prefix=3, infix=2), lorica.PreLayerConfig(prefix=3, infix=2)
METHODS = {config.method: config for config in (EMBED, LAYER)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "gpt2-classifier", "opt"])
def test_round_trip(name: str, method: str, tmp_path: Path) -> None:
    check_round_trip(name, METHODS[method], tmp_path, exact_start=False)
    check_round_trip(name, [METHODS[method], lorica.LoraConfig(r=2)], tmp_path / "lora", exact_start=False)


@pytest.mark.parametrize("method", METHODS)
def test_merge_and_mixed_refuse_by_name(method: str) -> None:
    check_refuses_merge("gpt2", METHODS[method])
    with pytest.raises(AdapterError, match=method):
        lorica.mixed(lorica.adapt(transformer("bert"), METHODS[method]), ["default", None, None])


def test_what_trains() -> None:
    for name, width in (("gpt2", 16), ("bert", 16), ("llama", 16), ("vit", 16)):
        model = lorica.adapt(transformer(name), EMBED)
        assert lorica.trainable_parameters(model).trainable == width * 5
        model = lorica.adapt(transformer(name), LAYER)
        assert lorica.trainable_parameters(model).trainable == 2 * width * 5
        assert all(".inserted.default." in n for n in trained_names(model))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_a_causal_model_sees_the_virtual_tokens(name: str) -> None:
    """The same model, given the embeddings by hand, in the order prefix, prompt, infix, target."""
    model = adapted(transformer(name), EMBED)
    value = lorica.extract(model)
    before, behind = (tensor for _, tensor in sorted(value.added.items(), reverse=True))
    base = transformer(name)
    tokens = batch(name)["input_ids"]
    words = base.get_input_embeddings()(tokens)
    rows = len(tokens)
    labels = tokens.clone()
    labels[:, :4] = -100
    x = torch.cat([before.expand(rows, -1, -1), words[:, :4], behind.expand(rows, -1, -1), words[:, 4:]], 1)
    logits = base(inputs_embeds=x).logits
    expected = torch.cat([logits[:, 3:6], logits[:, 8:]], 1)  # token 3 is read behind the infix
    output: Any = model(input_ids=tokens, labels=labels)
    assert torch.allclose(output.logits, expected, atol=1e-5)
    wide = torch.full((rows, x.shape[1]), -100)
    wide[:, 9:] = tokens[:, 4:]
    hand = torch.nn.functional.cross_entropy(expected[:, 3:-1].flatten(0, 1), tokens[:, 4:].flatten())
    assert torch.allclose(output.loss, hand, atol=1e-5)


@torch.no_grad()
def test_an_encoder_sees_them_and_its_head_does_not() -> None:
    model = adapted(transformer("bert-classifier"), EMBED)
    value = lorica.extract(model)
    before, behind = (tensor for _, tensor in sorted(value.added.items(), reverse=True))
    base = transformer("bert-classifier")
    tokens = batch()["input_ids"]
    words = base.get_input_embeddings()(tokens)
    x = torch.cat([before.expand(3, -1, -1), words, behind.expand(3, -1, -1)], 1)
    first = base.bert(inputs_embeds=x).last_hidden_state[:, 3]
    pooled = torch.tanh(base.bert.pooler.dense(first))
    assert torch.allclose(model(input_ids=tokens).logits, base.classifier(pooled), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama", "t5"])
def test_padding_changes_nothing(name: str, method: str) -> None:
    model = adapted(transformer(name), METHODS[method])
    given = batch(name)
    alone = outputs(model, name)
    pad = torch.zeros(3, 4, dtype=torch.long)
    for side in ("right", "left"):
        if side == "left" and name == "t5":
            continue  # its relative positions see the gap
        order = (lambda a, b: (a, b)) if side == "right" else (lambda a, b: (b, a))
        tokens = torch.cat(order(given["input_ids"], pad), 1)
        mask = torch.cat(order(torch.ones_like(given["input_ids"]), pad), 1)
        result: Any = model(**{**given, "input_ids": tokens, "attention_mask": mask})
        output = next(result[key] for key in ("logits", "last_hidden_state") if key in result)
        if name not in ("t5", "roberta", "distilbert"):
            output = output[:, :7] if side == "right" else output[:, 4:]
        if side == "left" and name in ("roberta", "distilbert"):
            continue  # their heads read the first token, which is padding then
        assert torch.allclose(output, alone, atol=1e-4)


@torch.no_grad()
def test_a_prefix_does_not_depend_on_the_input() -> None:
    model: Any = adapted(transformer("gpt2"), lorica.PreLayerConfig(prefix=3))
    seen: list[torch.Tensor] = []
    model.transformer.h[1].ln_1.register_forward_pre_hook(lambda m, a: seen.append(a[0][:, :3]))
    for seed in (0, 1):
        model(input_ids=torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(*seen)
    assert torch.equal(seen[0][0], lorica.extract(model).added["transformer.h.1.inserted.prefix"])


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_the_cache_agrees_with_the_whole_sequence(name: str, method: str) -> None:
    model: Any = adapted(transformer(name), METHODS[method])
    tokens = batch(name)["input_ids"][:, :4]
    pad, ones = torch.zeros(3, 2, dtype=torch.long), torch.ones_like(tokens)
    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
    }
    made = model.generate(input_ids=tokens, attention_mask=ones, **settings)
    labels = made.clone()
    labels[:, :4] = -100
    whole: Any = model(input_ids=made, labels=labels)
    whole.logits[..., 2] = -torch.inf  # the end, which min_new_tokens rules out
    assert torch.equal(whole.logits[:, 3:-1].argmax(-1), made[:, 4:])
    padded = model.generate(
        input_ids=torch.cat([pad, tokens], 1), attention_mask=torch.cat([pad, ones], 1), **settings
    )
    assert torch.equal(padded[:, 6:], made[:, 4:])
    beams = model.generate(input_ids=tokens, attention_mask=ones, num_beams=3, **settings)
    assert beams.shape == made.shape
    with lorica.disabled(model):
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    with pytest.raises(StateError, match="filled without the prefix"):
        model(input_ids=tokens[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 5))


@torch.no_grad()
def test_an_encoder_decoder_generates() -> None:
    model: Any = adapted(transformer("t5"), EMBED)
    made = model.generate(input_ids=batch("t5")["input_ids"], max_new_tokens=3, do_sample=False)
    with lorica.disabled(model):
        assert made.shape[0] == model.generate(input_ids=batch("t5")["input_ids"], max_new_tokens=3).shape[0]


@pytest.mark.parametrize(("name", "room"), [("bert", 20), ("roberta", 19), ("gpt2", 20), ("llama", 20)])
def test_the_room_that_is_left(name: str, room: int) -> None:
    model = lorica.adapt(transformer(name), EMBED)
    model(input_ids=torch.full((1, room - 5), 5))
    with pytest.raises(
        AdapterError, match=f"has {room - 4} tokens.*5 of the model's {room}.*{room - 5} remain"
    ):
        model(input_ids=torch.full((1, room - 4), 5))
    with lorica.disabled(model):
        model(input_ids=torch.full((1, room), 5))
    with pytest.raises(TargetError, match="no room for an input"):
        lorica.adapt(transformer(name), lorica.PreLayerConfig(prefix=room))


def test_generation_stops_at_the_limit() -> None:
    model = lorica.adapt(transformer("gpt2"), EMBED)
    with pytest.raises(AdapterError, match="shorten the input"):
        model.generate(input_ids=torch.full((1, 12), 5), max_new_tokens=6, min_new_tokens=6, pad_token_id=0)


def test_a_model_that_is_itself_the_host() -> None:
    model = transformer("bert")
    before, arguments = record(model), inspect.signature(model.forward)
    lorica.adapt(model, EMBED)
    assert inspect.signature(model.forward) == arguments
    assert type(model).__name__ == "BertModel"
    lorica.adapt(model, lorica.LoraConfig(r=2), "lora")
    shake(model)
    lorica.merge(model, "lora")
    assert type(model).__name__ == "BertModel"
    lorica.restore(model)
    lorica.detach(model, "default")
    assert lorica.adapters(model).keys() == {"lora"}
    lorica.detach(model)
    assert record(model) == before


def test_packed_rows_and_odd_masks_are_refused() -> None:
    model = lorica.adapt(transformer("gpt2"), EMBED)
    tokens = batch("gpt2")["input_ids"]
    with pytest.raises(StateError, match="packed"):
        model(input_ids=tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    with pytest.raises(StateError, match="attention mask"):
        model(input_ids=tokens, attention_mask=torch.ones(3, 1, 7, 7))
    layers = lorica.adapt(transformer("gpt2"), LAYER).train()
    layers.activation_checkpointing_enable()
    with pytest.raises(StateError, match="gradient checkpointing"):
        layers(input_ids=tokens, labels=tokens, use_cache=False)


def test_what_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="both 0"):
        lorica.PreEmbedConfig(prefix=0)
    with pytest.raises(ConfigError, match="infix must be a whole number"):
        lorica.PreLayerConfig(infix=-1)
    with pytest.raises(TargetError, match="no list of transformer blocks"):
        lorica.adapt(Toy(), EMBED)
    with pytest.raises(TargetError, match="two of the methods add to"):
        lorica.adapt(transformer("gpt2"), [EMBED, LAYER])
    families: set[str] = {config.family for config in METHODS.values() if isinstance(config, MethodConfig)}
    assert families == {"additive"}


@pytest.mark.parametrize("trainer", ["lorica", "transformers"])
def test_smoothed_labels_still_say_where_the_prompt_ends(trainer: str, tmp_path: Path) -> None:
    """A trainer that smooths labels computes the loss itself, and keeps them from the model."""
    transformers = pytest.importorskip("transformers")
    from lorica.train import Trainer

    tokens = batch("gpt2")["input_ids"]
    labels = tokens.clone()
    labels[:, :4] = -100
    model = lorica.adapt(transformer("gpt2"), lorica.PreEmbedConfig(prefix=0, infix=2))
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True
    )
    made = (Trainer if trainer == "lorica" else transformers.Trainer)(model=model, args=args)
    step = {"input_ids": tokens, "labels": labels}
    if trainer == "transformers":
        with pytest.raises(StateError, match="an infix stands where the prompt ends"):
            made.compute_loss(model.train(), step)
        return
    made.compute_loss(model.train(), step).backward()
    (infix,) = (p for p in model.parameters() if p.requires_grad)
    assert infix.grad is not None
    assert infix.grad.abs().max() > 0
    model.eval()
    with torch.no_grad():
        assert model(input_ids=tokens).logits.shape == (3, 7, 40)  # nothing of that call is left


def test_labels_that_are_no_next_tokens_say_nothing_of_the_prompt() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2ForTokenClassification(transformer("gpt2").config).eval()
    adapted(model, EMBED)
    tokens = batch("gpt2")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens, labels=tokens % 2).logits)
