"""Packed rows: the same rows, targets, loss and gradients as rows that stand alone, in fewer sequences."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train import tiny
from train.tasks.test_language import LM, decoder, encode, run, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from lorica.errors import ConfigError
from lorica.train import Trainer, evaluate, tasks, train
from lorica.train.prepared import lines, prepare
from lorica.train.tasks.packing import bins, check_packing, pack

ROWS = {
    "prompt": ["film", "film story plot", "song", "a", "cast of", "voice"],
    "completion": ["great", "dull song of a cold light", "warm", "great film", "dull", "plot scene"],
}
SMALL: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "intermediate_size": 64, "num_hidden_layers": 2, "n_layer": 2,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32,
    "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "ffn_dim": 64, "word_embed_proj_dim": 32,
    "max_position_embeddings": 64, "sliding_window": 6,
}  # fmt: skip


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a start of 0.02 hardly attends at all
            parameter.mul_(4)
    return model


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 64))
def test_every_row_is_in_one_sequence_none_of_which_is_too_long(lengths: list[int], limit: int) -> None:
    found = bins(lengths, limit)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in rows) for rows in found]
    assert max(sums) <= limit
    # None is opened while another had room: at most one is not more than half full.
    assert sum(total <= limit // 2 for total in sums) <= 1


def test_the_fullest_sequence_with_room_is_taken() -> None:
    assert bins([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_the_tokens_positions_and_targets_of_packed_rows() -> None:
    packed = pack(
        encode({"prompt": ["film", "song", "cast"], "completion": ["great", "dull", "warm plot"]}), 9
    )
    words = tokenizer().convert_ids_to_tokens
    seen = [
        " ".join(
            f"{(word.upper() if label != -100 else word)}/{place}"
            for word, label, place in zip(words(ids), labels, places, strict=True)
        )
        for ids, labels, places in zip(
            *(packed.features[name] for name in ("input_ids", "labels", "position_ids")), strict=True
        )
    ]
    assert seen == [
        "[CLS]/0 film/1 GREAT/2 [SEP]/3 [CLS]/0 cast/1 WARM/2 PLOT/3 [SEP]/4",
        "[CLS]/0 song/1 DULL/2 [SEP]/3",
    ]
    assert (len(packed), packed.features["length"]) == (3, [9, 4])


def test_a_row_s_first_token_is_no_target() -> None:
    packed = pack(encode({"text": ["film story", "great"]}, limit=4), 8)
    words = tokenizer().convert_ids_to_tokens
    assert words(packed.features["input_ids"][0]) == (
        ["[CLS]", "film", "story", "[SEP]", "[CLS]", "great", "[SEP]"]
    )
    assert [label == -100 for label in packed.features["labels"][0]] == [
        True,
        *[False] * 3,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "gpt_neox", "qwen3"])
def test_loss_and_gradients_equal_those_of_rows_that_stand_alone(kind: str) -> None:
    model, encoded, collate = model_of(kind), encode(ROWS), tasks.get(LM).collator(tokenizer())
    check_packing(model)
    model.double()
    packed = pack(encoded, 24).features
    assert len(packed) < len(encoded)
    names = ("input_ids", "attention_mask", "labels", "position_ids")
    found = []
    both: list[Any] = [[[row] for row in encoded.features], [list(packed)]]
    for batches in both:
        model.zero_grad()
        total, count = torch.zeros(()), 0
        for batch in batches:
            inputs = collate([{name: row[name] for name in names if name in row} for row in batch])
            targets = int((inputs["labels"][:, 1:] != -100).sum())
            total, count = total + model(**inputs, use_cache=False).loss * targets, count + targets
        (total / count).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(((total / count).item(), torch.cat(gradients)))
    (alone, gradient), (together, packed_gradient) = found
    assert together == pytest.approx(alone, abs=1e-6)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", ["mamba", "bloom", "opt"])
def test_a_model_that_mixes_packed_rows_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"(Mamba|Bloom|OPT)ForCausalLM .*eave out training\.packing"):
        check_packing(model_of(kind))


def test_the_trainer_s_loss_is_that_of_unpacked_rows_whatever_the_batch(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [*tiny.GOOD, *tiny.BAD, *tiny.OTHER]
    some = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(40)]
    encoded, model = encode({"prompt": some[:20], "completion": some[20:]}), decoder()
    losses = []
    for features, size in (
        (encoded.features, 20),
        (pack(encoded, 32).features, 3),
        (pack(encoded, 64).features, 1),
    ):
        args = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=size, prediction_loss_only=True, report_to="none",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, data_collator=tasks.get(LM).collator(tokenizer()))
        losses.append(trainer.evaluate(features)["eval_loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)


def test_a_packed_run_from_end_to_end(tmp_path: Path) -> None:
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in tiny.sentences(24)]
    recipe = run(LM, tmp_path, decoder(), rows)
    recipe = recipe.replace(
        training={"packing": True, "packed_length": 64, "max_length": 16, "batch_size": 2}
    )
    told = "\n".join(lines(prepare(recipe)))
    assert "18 training rows are packed into 3 sequences of up to 6" in told
    result = train(recipe)
    assert result.rows["train"] == 18
    scores = evaluate(result.output, tmp_path / "rows.jsonl")
    assert 0 < scores["loss"] < 4
    again = train(recipe.replace(output=str(tmp_path / "again")))
    assert again.adapter_sha256 == result.adapter_sha256


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    recipe = run(LM, tmp_path, decoder(), [{"text": "film", "label": "a"}, {"text": "song", "label": "b"}])
    with pytest.raises(ConfigError, match="packing is for causal language models; sequence-classification"):
        prepare(recipe.replace(task="sequence-classification", training={"packing": True}))
    with pytest.raises(ConfigError, match=r"packed_length must be None, or max_length \(64\) or more"):
        recipe.replace(training={"packing": True, "max_length": 64, "packed_length": 32})
