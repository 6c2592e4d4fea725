from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from train import tiny
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from lorica.errors import LoricaError
from lorica.train import DataConfig, Recipe, Trainer, evaluate, tasks, train
from lorica.train.data.splits import Splits

LM, S2S = "causal-lm", "seq2seq-lm"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    result = tiny.tokenizer()
    result.bos_token, result.eos_token = "[CLS]", "[SEP]"
    result.chat_template = template  # type: ignore[assignment]
    return result


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
    )


def encode(
    rows: dict[str, Any], *, limit: int = 32, task: str = LM, template: str | None = None, **data: Any
) -> Any:
    found = tasks.get(task)
    table = Dataset.from_dict(rows)
    config = found.resolve(Splits(table), DataConfig(**data))
    return found.encode(table, config, tokenizer(template), limit, "the training rows")


def targets(encoded: Any, row: int = 0) -> list[str]:
    ids = [label for label in encoded.features["labels"][row] if label != -100]
    return list(tokenizer().convert_ids_to_tokens(ids))


def test_only_the_completion_is_a_target() -> None:
    encoded = encode({"prompt": ["film story"], "completion": ["great song"]}, separator=" ")
    assert tokenizer().convert_ids_to_tokens(encoded.features["input_ids"][0]) == (
        ["[CLS]", "film", "story", "great", "song", "[SEP]"]
    )
    assert targets(encoded) == ["great", "song", "[SEP]"]


def test_the_loss_is_the_mean_over_the_completions_of_all_rows_whatever_the_batch(tmp_path: Path) -> None:
    rows = {"prompt": ["film", "film story plot"], "completion": ["great", "dull song of a cold light"]}
    encoded, model = encode(rows), decoder()
    total, count = 0.0, 0
    for row in encoded.features:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].detach().log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != -100:
                total, count = total - float(logits[place - 1, label]), count + 1
    for size in (1, 2):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path),
                per_device_eval_batch_size=size,
                prediction_loss_only=True,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            data_collator=tasks.get(LM).collator(tokenizer()),
        )
        found = trainer.evaluate(encoded.features)
        assert found["eval_loss"] == pytest.approx(total / count, abs=1e-6)
        assert found["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)


def test_raw_text_is_joined_and_cut_into_blocks_and_nothing_is_lost() -> None:
    encoded = encode({"text": ["film story", "great"]}, limit=4)
    assert encoded.features["input_ids"] == encoded.features["labels"]
    stream = [token for block in encoded.features["input_ids"] for token in block]
    assert tokenizer().convert_ids_to_tokens(stream) == (
        ["[CLS]", "film", "story", "[SEP]", "[CLS]", "great", "[SEP]"]
    )
    assert encoded.features["length"] == [4, 3]
    assert (len(encoded), encoded.truncated) == (2, 0)


def test_only_what_the_assistant_says_is_a_target() -> None:
    says = [("user", "film"), ("assistant", "great"), ("user", "song"), ("assistant", "dull plot")]
    messages = [{"role": role, "content": content} for role, content in says]
    encoded = encode({"messages": [messages]}, template=TEMPLATE)
    assert targets(encoded) == ["great", "dull", "plot"]


def test_a_long_row_loses_the_start_of_its_prompt_first() -> None:
    rows = {"prompt": ["film story plot scene"], "completion": ["great song"]}
    encoded = encode(rows, limit=4, separator=" ")
    assert encoded.truncated == 1
    assert encoded.longest == 8
    assert tokenizer().convert_ids_to_tokens(encoded.features["input_ids"][0]) == [
        "scene",
        "great",
        "song",
        "[SEP]",
    ]
    assert targets(encode(rows, limit=2)) == ["great"]


@pytest.mark.parametrize(
    ("task", "rows", "data", "message"),
    [
        (LM, {"messages": [[{"role": "user", "content": "film"}]]}, {}, "no message of the role 'assistant'"),
        (LM, {"messages": [[]]}, {}, "row 1 of the training rows has no messages"),
        (LM, {"messages": [[{"role": "user"}]]}, {}, "row 1 .* has message 1, which must have a role"),
        (LM, {"prompt": ["a"], "completion": [None]}, {}, "row 1 .* where a text is due"),
        (LM, {"prompt": ["a"]}, {"label": "completion"}, "name the prompt too"),
        (LM, {"text": ["a"]}, {"labels": ["x", "y"]}, "neither classes nor pairs"),
        (S2S, {"source": ["a"]}, {}, "which column holds the text to write"),
        (S2S, {"source": ["a"], "target": [None]}, {}, "row 1 .* where a text is due"),
        (S2S, {"text": ["a"]}, {"text": "text", "label": "text"}, "cannot be both read and written"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(task: str, rows: Any, data: Any, message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        encode(rows, task=task, template=TEMPLATE, **data)


def test_a_tokenizer_without_a_chat_template() -> None:
    with pytest.raises(LoricaError, match="has no chat template to lay out messages"):
        encode({"messages": [[{"role": "assistant", "content": "film"}]]})


def run(task: str, folder: Path, model: Any, rows: list[dict[str, Any]]) -> Recipe:
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    data = tiny.write_rows(folder / "rows.jsonl", rows)
    recipe = tiny.recipe(folder / "model", data, folder / "out", max_steps=20)
    return recipe.replace(task=task, data={"validation_fraction": 0.25})


def test_a_decoder_from_end_to_end(tmp_path: Path) -> None:
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in tiny.sentences(24)]
    recipe = run(LM, tmp_path, decoder(), rows).replace(data={"test": str(tmp_path / "rows.jsonl")})
    result = train(recipe)
    assert result.metrics["test"]["perplexity"] == pytest.approx(math.exp(result.metrics["test"]["loss"]))
    assert result.metrics["test"]["loss"] < math.log(32)
    assert evaluate(result.output)["loss"] == pytest.approx(result.metrics["test"]["loss"], abs=1e-5)


def test_an_encoder_and_decoder_from_end_to_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    rows = [{"source": row["text"], "target": row["label"]} for row in tiny.sentences(24)]
    result = train(run(S2S, tmp_path, T5ForConditionalGeneration(config), rows))
    scores = result.metrics["validation"]
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
