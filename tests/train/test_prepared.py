"""What a run says before it starts: lengths and cuts of every kind of rows, and nothing taken for markup."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import NEEDED
from rich.console import Console
from torch import nn
from train import tiny
from train.tasks.test_language import LM, S2S, TEMPLATE, decoder, tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from lorica.errors import ConfigError, FileError, MissingExtra
from lorica.layers.quantized import quantizer_of
from lorica.train import DataConfig, Recipe, evaluate, predict, prepare, train
from lorica.train.merge import merge_checkpoint
from lorica.train.prepared import announce
from lorica.train.trained import open_run


def said(folder: Path, task: str, rows: list[dict[str, Any]], limit: int = 64, **data: Any) -> list[str]:
    """The lines that a run on these rows begins with."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
    config = T5Config(**small, num_heads=2, decoder_start_token_id=0)  # pyright: ignore[reportCallIssue]
    model = decoder() if task == LM else T5ForConditionalGeneration(config)
    model.save_pretrained(folder / "model")
    tokenizer(TEMPLATE).save_pretrained(folder / "model")
    recipe = Recipe(
        task=task,
        model=str(folder / "model"),
        data=DataConfig(
            train=str(tiny.write_rows(folder / "rows.jsonl", rows)), validation_fraction=0.0, **data
        ),
    ).replace(training={"max_length": limit})
    output = io.StringIO()
    announce(prepare(recipe), Console(file=output, width=60))
    return output.getvalue().splitlines()


def of_lengths(low: int, middle: int, high: int, top: int) -> str:
    begins = f"tokens a training row: {low} at least, {middle} in the median"
    return f"{begins}, 95 % have up to {high}, {top} at most"


def test_prompts_and_completions(tmp_path: Path) -> None:
    # The model's own first and last token, and as many words as the numbers say.
    rows = [{"prompt": "film " * n, "completion": "great " * m} for n, m in ((1, 1), (2, 2), (10, 4))]
    lines = said(tmp_path, LM, rows, limit=10)
    assert of_lengths(4, 6, 15, 16) in lines
    assert "1 of 3 train rows (33.3%) are cut to 10 tokens; the longest has 16" in lines


def test_the_order_of_rows_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "film", "completion": "great " * n} for n in (1, 9)] * 16
    line = next(line for line in said(tmp_path, LM, rows) if "padding" in line)
    assert re.fullmatch(
        r"batches of rows drawn at random: \d+% of what the model reads is padding, by similar lengths 0%",
        line,
    )


def test_several_texts_for_a_prompt(tmp_path: Path) -> None:
    rows = [{"context": "film", "completion": "", "references": ["great", "fine warm cast"]}] * 2
    lines = said(tmp_path, LM, rows, text="context", label="completion")
    assert of_lengths(6, 6, 6, 6) in lines
    assert "2 training rows are read as 4 of up to 6 tokens" in lines


def test_raw_text_is_cut_into_blocks_and_not_cut_off(tmp_path: Path) -> None:
    lines = said(tmp_path, LM, [{"text": "film " * n} for n in (2, 8, 18)], limit=8)
    assert of_lengths(4, 10, 19, 20) in lines
    assert "3 training rows are read as 5 of up to 8 tokens" in lines
    assert not any("are cut to" in line for line in lines)


def test_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "great"}]
    lines = said(tmp_path, LM, [{"messages": turns}, {"messages": turns * 3}], limit=10)
    assert of_lengths(4, 8, 12, 12) in lines
    assert "1 of 2 train rows (50.0%) are cut to 10 tokens; the longest has 12" in lines


def test_texts_of_which_either_is_too_long(tmp_path: Path) -> None:
    rows = [{"source": "film " * n, "target": "great " * m} for n, m in ((1, 1), (2, 12), (12, 1), (4, 4))]
    lines = said(tmp_path, S2S, rows, limit=10)
    assert of_lengths(3, 10, 14, 14) in lines
    assert "2 of 4 train rows (50.0%) are cut to 10 tokens; the longest has 14" in lines


def test_the_limit_is_the_tokenizers_where_that_is_less(tmp_path: Path) -> None:
    lines = said(tmp_path, LM, [{"prompt": "film", "completion": "great " * 80}] * 2, limit=500)
    assert "2 of 2 train rows (100.0%) are cut to 64 tokens; the longest has 83" in lines


@pytest.mark.parametrize("text", ["[/bold]", "[red]film"])
def test_what_a_row_says_is_no_markup(tmp_path: Path, text: str) -> None:
    turns = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "great"}]
    bad = [{"role": text, "content": None}]
    lines = said(tmp_path, LM, [{"messages": turns}, {"messages": bad}], skip_bad=True)
    reason = next(line for line in lines if "left out" in line)
    assert reason.startswith("1 train rows are left out, the first of them because row 2 of ")
    assert f"{{'role': '{text}'}}" in reason or text in reason


def test_a_class_of_validation_rows_alone_is_told_what_to_do(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"text": "lovely film", "label": name} for name in "abcd"]
    data = DataConfig(train=str(tiny.write_rows(tmp_path / "rows.jsonl", rows)), validation_fraction=0.5)
    recipe = Recipe(model=str(tiny_model), data=data, output=str(tmp_path / "run"))
    with pytest.raises(
        FileError, match=r"which the training rows do not have.*; if it was set aside.*--data.labels"
    ):
        prepare(recipe)
    prepare(recipe.replace(data={"labels": [*"abcd"]}))


def test_test_rows_without_labels_are_named(tiny_model: Path, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "train.jsonl", tiny.sentences(8))
    tiny.write_rows(tmp_path / "test.jsonl", [{"text": "film"}])
    output = io.StringIO()
    recipe = Recipe(model=str(tiny_model), data=DataConfig(train=str(tmp_path)))
    announce(prepare(recipe), Console(file=output, width=60))
    assert f"{tmp_path / 'test.jsonl'} has no labels, and is not scored\n" in output.getvalue()


kinds = pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])


def packed(model: nn.Module) -> set[str]:
    """Last names of the layers whose weight is packed."""
    return {
        name.rpartition(".")[2] for name, module in model.named_modules() if quantizer_of(module) is not None
    }


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    pytest.importorskip("bitsandbytes", reason=NEEDED)
    made = make_recipe(epochs=15, load_best=False, learning_rate=3e-3)
    return made.replace(method={"r": 8, "lora_alpha": 16, "lora_dropout": 0.0})


@kinds
def test_from_the_recipe_to_predictions(kind: str, recipe: Recipe, tmp_path: Path) -> None:
    out = train(recipe.replace(quantization=kind)).output
    assert Recipe.load(out / "recipe.yaml").quantization == kind
    assert packed(open_run(out).model) == {"query", "key", "value", "dense"}
    scores = evaluate(out)
    assert scores["accuracy"] >= 0.9
    assert predict(out, ["lovely film"])[0]["label"] == "good"
    report, merged = merge_checkpoint(recipe.model, out, tmp_path / "merged")
    assert report.worst[1] < 1e-5  # on disk it goes into the original weights
    assert packed(open_run(merged).model) == set()
    assert evaluate(merged)["accuracy"] >= 0.9


def test_products_are_taken_in_the_dtype_of_training(recipe: Recipe) -> None:
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        prepared = prepare(recipe.replace(quantization="nf4", training={"bf16": bf16}))
        layer: Any = prepared.model.get_submodule("bert.encoder.layer.0.attention.self.query")
        assert layer.compute_dtype == dtype
        assert type(prepared.model.get_submodule("classifier")) is nn.Linear


def test_one_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="quantization must be None or one of"):
        Recipe(quantization="int3")


def test_without_bitsandbytes(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    recipe = make_recipe().replace(quantization="nf4")
    with pytest.raises(MissingExtra, match=r"bitsandbytes is not installed.*lorica\[quantized\]"):
        train(recipe)
    assert not (Path(recipe.output) / "adapter_config.json").exists()
