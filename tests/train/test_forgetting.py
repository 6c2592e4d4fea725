from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from train import tiny
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorica
from lorica.cli import main
from lorica.errors import ConfigError, FileError
from lorica.train import DataConfig, Recipe, TrainingConfig, evaluate, open_run, train
from lorica.train.forgetting import Forgetting, at_equal_score, forgetting

WORDS = (*tiny.GOOD, *tiny.BAD, *tiny.OTHER)


def walks(successors: Sequence[Sequence[int]], count: int, seed: int) -> list[dict[str, str]]:
    """Texts in which each word is followed by one of its successors."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        word, text = draw.randrange(len(WORDS)), []
        for _ in range(12):
            text.append(WORDS[word])
            word = draw.choice(successors[word])
        rows.append({"text": " ".join(text)})
    return rows


FIRST = [[(i + 1) % 18] for i in range(18)]
"""The language that the base knows: each word has one successor."""
SECOND = [[(i + 5) % 18] if i < 6 else [(i + 1) % 18] for i in range(18)]
"""The one to be learned: a third of the words have another."""


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder that knows the first language, and rows of both."""
    folder = tmp_path_factory.mktemp("languages")
    for name, grammar in (("first", FIRST), ("second", SECOND)):
        for seed, (split, count) in enumerate({"train": 96, "validation": 16, "test": 24}.items()):
            tiny.write_rows(folder / name / f"{split}.jsonl", walks(grammar, count, seed))
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
    )
    texts = [row["text"] for row in walks(FIRST, 256, 9)]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return {name: folder / name for name in ("first", "second", "base")}


@pytest.fixture(scope="module")
def runs(languages: dict[str, Path]) -> list[Path]:
    """The second language, learned by LoRA and by full fine-tuning."""
    found = []
    for name, baseline, rate in (("lora", None, 2e-2), ("full", {"method": "full"}, 3e-3)):
        output = languages["base"].parent / name
        recipe = Recipe(
            task="causal-lm",
            model=str(languages["base"]),
            data=DataConfig(train=str(languages["second"])),
            method=lorica.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"),
            baseline=baseline,
            training=TrainingConfig(
                learning_rate=rate, epochs=3, max_length=14, report_to=[], load_best=False
            ),
            output=str(output),
        )
        train(recipe)
        found.append(output)
    return found


def loss_of(model: Any, texts: list[str]) -> float:
    """Mean over all tokens but the first of each text, which nothing predicts."""
    tokenizer = tiny.tokenizer()
    total = count = 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total -= float(logp.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    return total / count


def test_a_language_model_is_scored_as_it_stands(runs: list[Path], languages: dict[str, Path]) -> None:
    found = forgetting(runs, DataConfig(train=str(languages["first"])))
    texts = [
        json.loads(line)["text"] for line in (languages["first"] / "test.jsonl").read_text().splitlines()
    ]
    base = loss_of(AutoModelForCausalLM.from_pretrained(languages["base"]).eval(), texts)
    for each, folder in zip(found, runs, strict=True):
        assert each.before == pytest.approx(base, rel=1e-4)
        assert each.after == pytest.approx(loss_of(open_run(folder).model, texts), rel=1e-4)
        assert each.learned == pytest.approx(evaluate(folder)["loss"], rel=1e-4)
        assert each.forgotten == each.after - each.before > 0.05  # a third of the words have other successors
        assert (each.metric, each.other_metric) == ("loss", "loss")
    assert [each.method for each in found] == ["lora", "full"]
    assert found[0].parameters < found[1].parameters
    assert {each.method for each in at_equal_score(found)} == {"lora", "full"}


def topics(count: int, seed: int) -> list[dict[str, str]]:
    """Rows whose class is told by which of two words is there, beside words that mean nothing."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [("film", "song")[i % 2], *draw.choices(tiny.OTHER[2:5], k=3)]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": ("seen", "heard")[i % 2]})
    return rows


def test_of_a_classifier_the_features_are_asked(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe()
    train(recipe)
    for seed, (split, count) in enumerate({"train": 60, "test": 40}.items()):
        tiny.write_rows(tmp_path / "topics" / f"{split}.jsonl", topics(count, seed))
    (found,) = forgetting([recipe.output], DataConfig(train=str(tmp_path / "topics")))
    assert (found.metric, found.other_metric, found.method) == ("accuracy", "probe accuracy", "lora")
    trained = open_run(recipe.output)

    @torch.no_grad()
    def features(rows: list[dict[str, str]]) -> Any:
        states = [
            trained.model.base_model(**trained.tokenizer(row["text"], return_tensors="pt"))[0][0].mean(0)
            for row in rows
        ]
        return torch.stack(states).double().numpy()

    def probed() -> float:
        learn, held = features(topics(60, 0)), features(topics(40, 1))
        centre, spread = learn.mean(0), learn.std(0)
        probe = LogisticRegression(max_iter=2000)
        probe.fit((learn - centre) / spread, [row["label"] for row in topics(60, 0)])
        return float(probe.score((held - centre) / spread, [row["label"] for row in topics(40, 1)]))

    assert found.after == pytest.approx(probed(), abs=0.026)  # a row
    with lorica.disabled(trained.model):
        assert found.before == pytest.approx(probed(), abs=0.026)
    assert found.before > 0.9
    assert found.forgotten == found.before - found.after


def made(method: str, learned: float, after: float, metric: str = "accuracy") -> Forgetting:
    return Forgetting(f"{method}-{learned}", method, 1, metric, learned, "probe accuracy", 0.9, after)


def test_methods_are_compared_where_they_have_learned_as_much() -> None:
    lora = [made("lora", 0.7, 0.89), made("lora", 0.8, 0.85), made("lora", 0.82, 0.8)]
    full = [made("full", 0.75, 0.8), made("full", 0.79, 0.7), made("full", 0.9, 0.5)]
    assert [f.run for f in at_equal_score([*lora, *full])] == ["lora-0.82", "full-0.79"]
    # Of a loss less is more.
    lora, full = [made("lora", x, 0.8, "loss") for x in (2.0, 1.0)], [made("full", 1.2, 0.8, "loss")]
    assert [f.run for f in at_equal_score([*lora, *full])] == ["lora-1.0", "full-1.2"]
    with pytest.raises(ConfigError, match=r"all runs are of one method, \['lora'\]"):
        at_equal_score(lora)


def test_what_cannot_be_measured(
    runs: list[Path], languages: dict[str, Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    other = DataConfig(train=str(languages["first"]))
    with pytest.raises(ConfigError, match="at least one folder"):
        forgetting([], other)
    with pytest.raises(FileError, match="there is no folder"):
        forgetting([tmp_path / "none"], other)
    recipe = make_recipe(max_steps=1)
    train(recipe)
    with pytest.raises(
        ConfigError, match=r"was trained for accuracy, .* for loss; runs are compared on one task"
    ):
        forgetting([runs[0], recipe.output], other)
    with pytest.raises(ConfigError, match="label"):
        forgetting([recipe.output], other)  # texts without classes
    (Path(recipe.output) / "run.json").unlink()
    with pytest.raises(FileError, match=r"cannot read the run .*run\.json"):
        forgetting([recipe.output], other)


def test_the_command(
    runs: list[Path], languages: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["study", "forget", *map(str, runs), "--data.train", str(languages["first"])]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["method"] for each in found] == ["lora", "full"]
    assert found[0]["forgotten"] == found[0]["after"] - found[0]["before"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"forgotten at about the same loss: lora \+0\.\d+ .*; full \+", out)
    assert main(["study", "forget", str(runs[0])]) == 1
    assert "--data.train" in capsys.readouterr().err
    assert main(["study", "forget", "--help"]) == 0
    assert "features still tell" in " ".join(capsys.readouterr().out.split())
