"""`generate`, in Python and as a command: prompts laid out as they were learned, adapters side by side."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from train.generation.test_writing import restless
from train.tasks.test_language import TEMPLATE, decoder, tokenizer
from transformers import LlamaForCausalLM

import lorica
from lorica.cli import main
from lorica.errors import LoricaError
from lorica.train import DataConfig, GenerationConfig, Recipe, generate, predict, tasks
from lorica.train.generation.generate import opened
from lorica.train.generation.writing import write

PROMPTS = ["film story", "song", "great cast light plot"]
SHORT = GenerationConfig(max_new_tokens=5)


def adapted(model: LlamaForCausalLM, name: str, seed: int) -> None:
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules="all-linear"), name, seed=seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f"lora_B.{name}" in path:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two adapters for it, and what training one of them would have left."""
    root = tmp_path_factory.mktemp("models")
    model = restless(decoder())
    model.save_pretrained(root / "base")
    tokenizer(TEMPLATE).save_pretrained(root / "base")
    for seed, name in enumerate(("one", "two")):
        model = LlamaForCausalLM.from_pretrained(root / "base")
        adapted(model, name, seed)
        lorica.save(model, root / name, name)
    columns = {"run": ("prompt", "completion"), "chat": ("messages", None)}
    for kind, (text, label) in columns.items():
        lorica.save(model, root / kind, "two")
        tokenizer(TEMPLATE).save_pretrained(root / kind)
        data = DataConfig(text=text, label=label, separator=" light ")
        recipe = Recipe(task="causal-lm", model=str(root / "base"), data=data)
        recipe.replace(generation={"max_new_tokens": 4}).save(root / kind / "recipe.yaml")
    return {path.name: path for path in root.iterdir()}


def by_hand(base: Path, adapter: Path | None, texts: list[str], new: int = 5) -> list[str]:
    model = LlamaForCausalLM.from_pretrained(base)
    if adapter is not None:
        lorica.load(model, adapter)
    ids = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = write(model, tokenizer(), [[2, *row] for row in ids], GenerationConfig(max_new_tokens=new))
    return [texts[0] for texts in found]


def test_a_model_an_adapter_and_a_run(folders: dict[str, Path]) -> None:
    base = folders["base"]
    for source, adapter in (("base", None), ("one", folders["one"])):
        rows = generate(folders[source], PROMPTS, SHORT)
        assert [row["generated"] for row in rows] == by_hand(base, adapter, PROMPTS)
        assert [row["prompt"] for row in rows] == PROMPTS
    laid_out = [f"{prompt} light" for prompt in PROMPTS]
    expected = by_hand(base, folders["run"], laid_out, new=4)
    for merged in (False, True):
        assert [row["generated"] for row in generate(folders["run"], PROMPTS, merged=merged)] == expected


def test_a_merged_adapter_is_taken_out_again(folders: dict[str, Path]) -> None:
    trained = opened(folders["one"])
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    generate(trained, PROMPTS, SHORT, merged=True)
    after = trained.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_conversation_is_laid_out_by_its_template(folders: dict[str, Path]) -> None:
    # "user", "assistant" are no words of this tokenizer, and become [UNK].
    expected = write(
        opened(folders["chat"]).model,
        tokenizer(),
        [tokenizer()("user film assistant ", add_special_tokens=False)["input_ids"]],
        GenerationConfig(max_new_tokens=4),
    )
    assert generate(folders["chat"], ["film"])[0]["generated"] == expected[0][0]
    assert generate(folders["chat"], ["film"], chat=False)[0]["generated"] != expected[0][0]
    (told,) = predict(folders["chat"], ["film"], generation=GenerationConfig(max_new_tokens=4))
    assert told == {"messages": [{"role": "user", "content": "film"}], "generated": expected[0][0]}


def test_adapters_answer_side_by_side(folders: dict[str, Path]) -> None:
    rows = generate(folders["base"], PROMPTS, SHORT, adapters=[folders["one"], folders["two"]])
    assert [row["adapter"] for row in rows] == [None, "one", "two"] * 3
    for i, adapter in enumerate((None, folders["one"], folders["two"])):
        assert [row["generated"] for row in rows[i::3]] == by_hand(folders["base"], adapter, PROMPTS)


def test_a_text_comes_in_parts(folders: dict[str, Path]) -> None:
    parts: list[str] = []
    found = generate(folders["one"], ["film"], SHORT, stream=parts.append)
    assert "".join(parts).strip() == found[0]["generated"]
    assert len(parts) > 1


def test_what_cannot_be_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    one = folders["one"]
    with pytest.raises(LoricaError, match="there is no prompt"):
        generate(one, [])
    with pytest.raises(LoricaError, match="can be shown as it comes for one prompt"):
        generate(one, PROMPTS, stream=print)
    with pytest.raises(LoricaError, match="one adapter can be merged"):
        generate(one, PROMPTS, adapters=[folders["two"]], merged=True)
    with pytest.raises(LoricaError, match="cannot load a model from"):
        generate(tmp_path, PROMPTS)
    settings = json.loads((one / "adapter_config.json").read_text())
    for name in ("adapter_model.safetensors",):
        (tmp_path / name).write_bytes((one / name).read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(LoricaError, match="does not say which base it is for"):
        generate(tmp_path, PROMPTS)


def test_the_command(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = by_hand(folders["base"], folders["one"], PROMPTS)
    one, five = str(folders["one"]), ["--generation.max_new_tokens", "5"]
    assert main(["generate", one, *PROMPTS, *five]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    assert main(["generate", one, *five, "--merge"]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "said.jsonl"
    arguments = ["--file", str(tmp_path / "prompts.txt"), "-o", str(out), "--adapter", str(folders["two"])]
    assert main(["generate", one, *five, *arguments, "--generation.num_beams", "2", "--sequences", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 * 2 * 2
    assert rows[0].keys() == {"prompt", "adapter", "generated"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "none.txt"], "cannot read none.txt"),
        (["film", "--file", "none.txt"], "not both"),
        (["film", "--generation.num_beams", "0"], "generation.num_beams must be more than 0"),
        (["film", "--generation.max_new_tokens", "4000"], "the model takes 2,048"),
    ],
)
def test_wrong_use_of_the_command(
    folders: dict[str, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folders["one"]), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_classifier_writes_nothing(folders: dict[str, Path]) -> None:
    classifier = dataclasses.replace(opened(folders["one"]), task=tasks.get("regression"))
    with pytest.raises(LoricaError, match="regression writes no text"):
        generate(classifier, PROMPTS)
