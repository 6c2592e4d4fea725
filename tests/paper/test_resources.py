"""Counts, files and sizes that the paper and texts about it print, from the shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Toy, bits, tokens
from torch import nn

import lorica
from lorica import study
from lorica.checkpoint.peft import WEIGHTS_FILE
from lorica.study.planning import cost
from lorica.study.planning.tracing import Step


def counted(d_in: int, d_out: int, r: int) -> int:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(d_in, d_out, bias=False))
    return lorica.trainable_parameters(
        lorica.adapt(model, lorica.LoraConfig(r=r, target_modules=["0"]))
    ).trainable


def test_two_thin_matrices() -> None:
    assert counted(500, 400, 4) == 3_600 < 500 * 400
    for d in (64, 768):
        for r in (1, 2, 8):
            assert counted(d, d, r) == 2 * d * r


def test_the_base_neither_moves_nor_is_remembered() -> None:
    """After steps of Adam: no bit of W0 differs, it has no gradient, and the optimizer keeps none of it."""
    model = Toy()
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["up", "down"]))
    base = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    before = {name: bits(p) for name, p in base.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        model(tokens()).square().sum().backward()
        adam.step()
    assert not any(torch.equal(p, s) for p, s in zip(trained, start, strict=True))
    assert {name: bits(p) for name, p in base.items()} == before
    assert all(p.grad is None for p in base.values())
    kept = sum(t.numel() for state in adam.state.values() for t in state.values() if t.dim())
    assert kept == 2 * sum(p.numel() for p in trained)


def test_the_file_is_its_numbers_and_a_header(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100))
    lorica.adapt(model, lorica.LoraConfig(r=4, target_modules=["0", "1"]))
    count = lorica.trainable_parameters(model).trainable
    lorica.save(model, tmp_path)
    size = (tmp_path / WEIGHTS_FILE).stat().st_size
    header = int.from_bytes((tmp_path / WEIGHTS_FILE).read_bytes()[:8], "little")
    assert size == 8 + header + 4 * count
    assert header < 1000


def test_gpt3_s_share_that_trains_and_a_hundred_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Footnote 4 prints 354 GB against 35 TB: 350 + 100 · 35 MB, and 100 · 350 GB."""
    config = lorica.LoraConfig(r=1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    monkeypatch.setattr(cost, "trace", lambda *_, **__: Step(held=0, flops=0))  # counts need no step
    gpt3 = study.plan("gpt3", config, batch=1, length=1, dtype=torch.float16)
    assert gpt3.trainable == 4_718_592
    assert 100 * gpt3.trainable / gpt3.parameters == pytest.approx(0.0027, rel=0.01)
    adapter = 2 * 4 * gpt3.trainable  # of rank 4, in 16 bits as the base
    assert (gpt3.full_checkpoint + 100 * adapter) / 1e9 == pytest.approx(354, rel=0.005)
    assert 100 * gpt3.full_checkpoint / 1e12 == pytest.approx(35, rel=0.005)
    assert gpt3.full_checkpoint / adapter == pytest.approx(10_000, rel=0.08)


@pytest.mark.parametrize(
    ("settings", "printed"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, 440e6),
        (
            {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514}
            | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
            | {"intermediate_size": 4096, "type_vocab_size": 1},
            1.33 * 2**30,
        ),
    ],
    ids=["bert-base", "roberta-large"],
)
def test_sizes_of_whole_models(settings: dict[str, object], printed: float) -> None:
    """Texts print 450 MB for BERT-base and 1.3 GB for RoBERTa: what a copy for each task would take."""
    pytest.importorskip("transformers")
    found = study.plan(settings, method="full", batch=1, length=2)
    assert found.full_checkpoint == pytest.approx(printed, rel=0.02)
