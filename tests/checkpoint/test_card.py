"""The model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorica


def adapter(ranks: tuple[int, ...] = (2,), **settings: Any) -> lorica.Adapter:
    settings = {"target_modules": ["q"]} | settings
    factors = {f"{i}.q": lorica.Factors(torch.ones(r, 3), torch.ones(4, r), 1.0) for i, r in enumerate(ranks)}
    patterns = {f"{i}.q": r for i, r in enumerate(ranks)}
    return lorica.Adapter(lorica.LoraConfig(r=ranks[0], rank_pattern=patterns, **settings), factors)


def card(folder: Path, **settings: Any) -> str:
    return (lorica.write(adapter(**settings), folder) / "README.md").read_text()


def test_it_says_what_the_adapter_is(tmp_path: Path) -> None:
    text = card(
        tmp_path,
        ranks=(2, 4),
        lora_alpha=16,
        use_rslora=True,
        base_model_name_or_path="someone/base",
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    )
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert front.splitlines() == [
        "base_model: someone/base",
        "library_name: peft",
        "pipeline_tag: text-classification",
        "tags:",
        "- lora",
        "- lorica",
        "- adapter",
        "- base_model:adapter:someone/base",
        "- transformers",
    ]
    for line in (
        "# A LoRA adapter for someone/base",
        "| rank | 2 to 4 |",
        "| alpha | 16, scaled by the square root of the rank |",
        "| adapted modules | 2 |",
        "| parameters | 42 |",
        "| trained whole | classifier |",
    ):
        assert line in body.splitlines()


@pytest.mark.parametrize("base", [None, "/models/private/base", "../a/b/c"])
def test_a_path_is_not_given_out_as_a_name_on_the_hub(base: str | None, tmp_path: Path) -> None:
    text = card(tmp_path, base_model_name_or_path=base)
    assert "base_model" not in text
    assert "| rank | 2 |" in text


def test_it_follows_the_adapter_until_somebody_edits_it(tmp_path: Path) -> None:
    assert "| alpha | 8 |" in card(tmp_path)
    assert "| alpha | 5 |" in card(tmp_path, lora_alpha=5)
    path = tmp_path / "README.md"
    edited = (
        "\n".join(line for line in path.read_text().splitlines() if "written by lorica" not in line)
        + "\nMine.\n"
    )
    path.write_text(edited)
    assert card(tmp_path, lora_alpha=7) == edited


def test_a_card_of_other_origin_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe not even text")
    lorica.write(adapter(), tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe not even text"


def test_a_card_that_cannot_be_read_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    assert lorica.read(lorica.write(adapter(), tmp_path)).lora.r == 2
    assert (tmp_path / "README.md").is_dir()


def test_it_says_how_to_load_it(tmp_path: Path) -> None:
    text = card(tmp_path, base_model_name_or_path="someone/base", task_type="CAUSAL_LM", ranks=(2, 24))
    assert 'lorica.load(model, "path/to/this/folder")' in text
    assert 'PeftModel.from_pretrained(model, "path/to/this/folder")' in text
    assert "vllm serve someone/base --enable-lora --max-lora-rank 32 --lora-modules mine=path/to" in text


@pytest.mark.parametrize(
    "settings", [{"task_type": "SEQ_CLS"}, {"task_type": "CAUSAL_LM", "ranks": (999,)}, {"task_type": None}]
)
def test_it_speaks_of_vllm_only_where_that_serves_it(settings: dict[str, Any], tmp_path: Path) -> None:
    text = card(tmp_path, **settings)
    assert "vllm" not in text
    assert "PeftModel" in text
