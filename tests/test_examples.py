"""The scripts in examples/ run, and count what the documents print that they follow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.peft import LoraConfig, PeftModel, TaskType, get_peft_model

# transformers warns of its own future.
pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for needed in ("transformers", "datasets", "sklearn", "jsonargparse", "tensorboard"):
        pytest.importorskip(needed, reason="needs: pip install 'lorica[train]'")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield import_module(request.param)
    for name in (request.param, "small"):
        sys.modules.pop(name, None)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.mark.parametrize("example", ["seq2seq"], indirect=True)
@pytest.mark.parametrize("loop", ["trainer", "bare"])
def test_sequence_to_sequence(example: Any, loop: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    untrained = example.main(output=tmp_path / "none", loop="bare", rows=64, epochs=0)
    assert example.main(output=tmp_path, loop=loop, rows=256, epochs=2) < untrained - 0.1
    assert files(tmp_path) >= ADAPTER


@pytest.mark.parametrize("example", ["sentiment"], indirect=True)
@pytest.mark.parametrize("loop", ["trainer", "bare"])
def test_sentiment(example: Any, loop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = example.main(output=tmp_path, loop=loop, rows=256, steps=200, epochs=3, lr=4e-3)
    assert after["Accuracy"] > 0.8
    assert after.keys() == {"Eval Loss", "F1 Score", "Precision", "Recall", "Accuracy"}
    assert "trainable params: 8,386 || all params: 114,244 || trainable%: 7.3404" in capsys.readouterr().out
    assert files(tmp_path) >= ADAPTER
    assert (tmp_path / "curves").is_dir() is (loop == "bare")


@pytest.mark.parametrize("example", ["images"], indirect=True)
@pytest.mark.parametrize("loop", ["trainer", "bare"])
def test_images(example: Any, loop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(output=tmp_path, loop=loop, rows=600, epochs=4) > 0.15
    assert "told as" in capsys.readouterr().out
    assert files(tmp_path) >= ADAPTER


def of_full_size(model: str, config: str, **settings: Any) -> Any:
    """A model with the shapes of the pretrained one, and no memory for its weights."""
    transformers = pytest.importorskip("transformers", reason="needs: pip install 'lorica[train]'")
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**settings))


def test_distilberts_counts_are_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    base = of_full_size("DistilBertForSequenceClassification", "DistilBertConfig", num_labels=2)
    config = LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_lin", "v_lin"], lora_dropout=0.05, task_type=TaskType.SEQ_CLS
    )
    get_peft_model(base, config).print_trainable_parameters()
    text = "trainable params: 739,586 || all params: 67,694,596 || trainable%: 1.0925\n"
    assert capsys.readouterr().out == text


def test_vits_count_is_the_documents() -> None:
    base = of_full_size("ViTForImageClassification", "ViTConfig", num_labels=101)
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    targets = ["query", "value"] if "query" in names else ["q_proj", "v_proj"]
    config = LoraConfig(
        r=16, lora_alpha=16, target_modules=targets, lora_dropout=0.1, modules_to_save=["classifier"]
    )
    model: PeftModel = get_peft_model(base, config)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 667_493
    # The document leaves out the frozen original of the head, which stays beside its trained copy.
    assert total - sum(p.numel() for p in base.classifier.parameters(recurse=False)) == 86_466_149


def test_mt0_larges_count(capsys: pytest.CaptureFixture[str]) -> None:
    large = {
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 24,
        "num_heads": 16,
        "vocab_size": 250112,
    }
    base = of_full_size("MT5ForConditionalGeneration", "MT5Config", **large)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    get_peft_model(base, config).print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 2,359,296 ||")
