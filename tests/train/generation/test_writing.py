"""Text written in batches is the text written alone; it is scored against every reference of its prompt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from train import tiny
from train.tasks.test_language import TEMPLATE, decoder, encode, run, tokenizer
from transformers import BertModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

import lorica
from lorica.errors import LoricaError
from lorica.train import DataConfig, GenerationConfig, evaluate, predict, tasks, train
from lorica.train.generation.writing import prompts_in, settings_of, write
from lorica.train.metrics import written

LM, S2S = "causal-lm", "seq2seq-lm"
PROMPTS = [[2, 14, 15], [2, 16], [2, 17, 18, 19, 20, 5], [2, 9]]


def restless(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose every weight is drawn anew, so that what it writes depends on what it reads."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def alone(model: PreTrainedModel, prompt: list[int], **options: Any) -> str:
    ids = torch.tensor([prompt])
    found: Any = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)  # type: ignore[operator]
    start = 0 if model.config.is_encoder_decoder else len(prompt)
    return str(tokenizer().decode(found[0, start:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("make", [decoder, t5])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_writes_what_each_prompt_would_alone(make: Any, beams: int) -> None:
    model = restless(make()).train()
    config = GenerationConfig(max_new_tokens=6, num_beams=beams, batch_size=3, length_penalty=0.9)
    together = write(model, tokenizer(), PROMPTS, config)
    assert model.training
    model.eval()
    options = {"length_penalty": 0.9} if beams > 1 else {}
    expected = [alone(model, ids, max_new_tokens=6, num_beams=beams, **options) for ids in PROMPTS]
    assert together == [[text] for text in expected]
    assert len(set(expected)) > 1


def test_drawing_repeats_by_its_seed_and_leaves_others_numbers_alone() -> None:
    model, config = restless(decoder()), GenerationConfig(max_new_tokens=6, do_sample=True, top_k=0)
    before = torch.get_rng_state()
    first, again, other = (write(model, tokenizer(), PROMPTS, config, sequences=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
    assert [len(texts) for texts in first] == [3] * 4


def test_each_prompt_may_have_an_adapter_of_its_own() -> None:
    model = restless(decoder())
    for i, name in enumerate(("a", "b")):
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules="all-linear"), name, seed=i)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    config, names = GenerationConfig(max_new_tokens=5, num_beams=2), ["a", None, "b", "a"]
    found = write(model, tokenizer(), PROMPTS, config, adapters=names)
    for prompt, name, texts in zip(PROMPTS, names, found, strict=True):
        with lorica.disabled(model) if name is None else lorica.active(model, name):
            assert texts == [alone(model, prompt, max_new_tokens=5, num_beams=2)]


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        ({"max_new_tokens": 2045}, PROMPTS, "prompt 3 has 6 tokens and 2,045 more .* the model takes 2,048"),
        ({}, [[1], []], "prompt 2 gives no tokens"),
        ({"arguments": {"num_beam": 2}}, PROMPTS, "no 'num_beam'; did you mean 'num_beams'"),
        ({"arguments": {"num_beams": 2}}, PROMPTS, "'num_beams', which has a place of its own"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(options: Any, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        write(decoder(), tokenizer(), prompts, GenerationConfig(**options))


def test_a_text_ends_with_the_tokenizers_token_too() -> None:
    model = restless(decoder())
    model.generation_config.eos_token_id = 9
    assert settings_of(model, tokenizer(), GenerationConfig()).eos_token_id == [9, 3]
    given = GenerationConfig(arguments={"eos_token_id": 5})
    assert settings_of(model, tokenizer(), given).eos_token_id == 5


def test_several_texts_need_beams_or_drawing_and_an_encoder_writes_none(tiny_model: Path) -> None:
    with pytest.raises(LoricaError, match="2 different texts a prompt need do_sample"):
        write(decoder(), tokenizer(), PROMPTS, GenerationConfig(), sequences=2)
    with pytest.raises(LoricaError, match="BertModel does not write text"):
        write(BertModel.from_pretrained(tiny_model), tokenizer(), PROMPTS, GenerationConfig())


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("num_beams", 0), ("top_p", 0.0), ("eval_rows", 0)]
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(LoricaError, match=f"generation.{name} must be"):
        GenerationConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("task", [LM, S2S])
def test_a_row_is_learned_with_each_of_its_references_and_asked_once(task: str) -> None:
    rows = {
        "context": ["film plot", "song"],
        "completion": ["", ""],
        "references": [["great", "fine cast"], ["dull"]],
    }
    encoded = encode(rows, task=task, text="context", label="completion")
    assert len(encoded) == 2
    wanted = prompts_in(encoded.features)
    assert wanted.references == [["great", "fine cast"], ["dull"]]
    assert [tokenizer().decode(ids) for ids in wanted.prompts] == [
        ("[CLS] film plot" if task == LM else "[CLS] film plot [SEP]"),
        ("[CLS] song" if task == LM else "[CLS] song [SEP]"),
    ]
    plain = {"context": ["film", "film"], "completion": ["great", "dull"]}
    assert prompts_in(encode(plain, task=task).features).references == [["great", "dull"]]
    assert len(encode(plain, task=task)) == 2


@pytest.mark.parametrize("right", ["great", " ".join(tiny.OTHER)])
def test_what_is_written_from_does_not_hang_on_what_would_be_right(right: str) -> None:
    rows = {"prompt": [" ".join((*tiny.GOOD, *tiny.OTHER)), "film"], "completion": [right] * 2}
    features = encode(rows, limit=10, separator=" ").features
    assert [tokenizer().decode(ids) for ids in prompts_in(features).prompts] == [
        " ".join((*tiny.GOOD, *tiny.OTHER)[-10:]),
        "[CLS] film",
    ]


def test_a_conversation_that_is_cut_asks_for_its_last_answer() -> None:
    said = [" ".join(tiny.GOOD), "film", " ".join(tiny.BAD), "song"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    for limit in (32, 8):
        wanted = prompts_in(encode({"messages": [messages]}, limit=limit, template=TEMPLATE).features)
        assert wanted.references == [["song"]]
        (prompt,) = wanted.prompts
        ends = tokenizer(TEMPLATE)(f"{said[2]} assistant", add_special_tokens=False)["input_ids"]
        assert prompt[-len(ends) :] == ends
        assert len(prompt) <= limit


def test_an_empty_list_leaves_the_one_text_and_a_gap_is_refused() -> None:
    rows: dict[str, Any] = {"context": ["film"], "completion": ["great"], "references": [[]]}
    assert prompts_in(encode(rows).features).references == [["great"]]
    rows["references"] = [["fine", None]]
    with pytest.raises(LoricaError, match=r"row 1 of the training rows has .* where texts are due"):
        encode(rows)


def test_a_conversation_is_asked_for_its_last_answer() -> None:
    says = [("user", "film"), ("assistant", "great"), ("user", "song"), ("assistant", "dull plot")]
    messages = [{"role": role, "content": content} for role, content in says]
    encoded = encode({"messages": [messages]}, template=TEMPLATE)
    wanted, spoken = prompts_in(encoded.features), tokenizer(TEMPLATE)
    assert wanted.references == [["dull plot"]]
    task, table = tasks.get(LM), Dataset.from_dict({"messages": [messages]})
    found = task.prompts(table, DataConfig(text="messages"), spoken, "the rows")  # type: ignore[attr-defined]
    assert found == wanted.prompts
    unasked = Dataset.from_dict({"messages": [messages[1:2]]})
    with pytest.raises(LoricaError, match="nothing that the assistant could answer"):
        task.prompts(unasked, DataConfig(text="messages"), spoken, "the rows")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("task", "make"), [(LM, decoder), (S2S, t5)])
def test_scores_of_what_is_written_in_training_and_after_it(task: str, make: Any, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="needs: pip install 'lorica[generation]'")
    names = ("prompt", "completion") if task == LM else ("source", "target")
    rows: list[dict[str, Any]] = [dict(zip(names, row.values(), strict=True)) for row in tiny.sentences(24)]
    recipe = run(task, tmp_path, make(), rows).replace(
        data={"test": str(tmp_path / "rows.jsonl")},
        generation={"metrics": ["bleu", "rouge", "exact_match", "f1"], "max_new_tokens": 3, "eval_rows": 2},
        training={"metric_for_best": "rouge1"},
    )
    result = train(recipe)
    of_words = {"bleu", "rouge1", "rouge2", "rougeL", "exact_match", "f1"}
    assert {"loss", "perplexity", *of_words} == set(result.metrics["test"])
    again = evaluate(result.output, predictions=tmp_path / "said.jsonl")
    assert again["rouge1"] == pytest.approx(result.metrics["test"]["rouge1"])
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    texts = [row["generated"] for row in said]
    assert written(texts, [row["references"] for row in said], ["rouge"])["rouge1"] == again["rouge1"]
    right = [row["generated"] in row["references"] for row in said]
    assert again["exact_match"] == pytest.approx(sum(right) / len(right))
    predicted = predict(result.output, [row[names[0]] for row in rows])
    assert predicted[0].keys() == {names[0], "generated"}
    assert {row["generated"] for row in predicted} == set(texts)
    longer = GenerationConfig(max_new_tokens=1)
    assert all(
        len(row["generated"].split()) < 2 for row in predict(result.output, ["film"], generation=longer)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": {"metrics": ["blue"]}}, "no metric 'blue'"),
        ({"generation": {"metrics": ["exact"]}}, "no metric 'exact'.*exact_match"),
        ({"generation": {"metrics": ["bleu"], "max_new_tokens": 9999}}, "lower max_new_tokens"),
        ({"generation": {"metrics": ["bleu"]}, "data": {"text": "prompt"}}, "texts without prompts"),
    ],
)
def test_what_could_not_be_scored_is_refused_before_training(
    change: Any, message: str, tmp_path: Path
) -> None:
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in tiny.sentences(8)]
    with pytest.raises(LoricaError, match=message):
        train(run(LM, tmp_path, decoder(), rows).replace(**change))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_task_that_writes_nothing_is_not_asked_to(make_recipe: Any) -> None:
    with pytest.raises(LoricaError, match="sequence-classification writes no text"):
        train(make_recipe().replace(generation={"metrics": ["bleu"]}))


def test_rows_of_e2e_with_all_their_references(data_dir: Path) -> None:
    with gzip.open(data_dir / "e2e_nlg" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(20), lines, strict=False)]
    table = Dataset.from_list([{"context": r["context"], "references": r["references"]} for r in rows])
    data = DataConfig(text="context", label="completion")
    wanted = prompts_in(tasks.get(LM).encode(table, data, tokenizer(), 64, "the rows").features)
    assert wanted.references == [row["references"] for row in rows]
