"""DoRA as plain LoRA: the nearest of a rank, and the error that is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_gguf import FAMILIES, trained

import lorica
from lorica.cli import main
from lorica.errors import AdapterError, ConfigError
from lorica.export import check_serve, without_dora


def dora(name: str) -> tuple[Any, lorica.Adapter]:
    """An adapted model whose magnitudes have moved."""
    model, _ = trained(name, use_dora=True)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "magnitude" in path:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model.eval(), lorica.extract(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_at_full_rank_the_logits_are_doras(name: str) -> None:
    model, _ = dora(name)
    ids = torch.randint(0, 32, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
    plain, report = without_dora(model, rank=48)
    assert not plain.lora.use_dora
    assert report.worst[1] < 1e-6
    lorica.detach(model)
    with torch.no_grad():
        base = model(ids).logits
        lorica.attach(model, plain)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 0.05


def test_the_error_is_that_of_the_best_approximation() -> None:
    model, _ = dora("gpt2")
    plain, report = without_dora(model, rank=6)
    for path, told in report.layers.items():
        delta = lorica.delta_weight(model, path).T.double()  # Conv1D
        S = torch.linalg.svdvals(delta)
        assert told.rank == 6
        assert told.norm == pytest.approx(float(S.norm()), rel=1e-6)
        assert told.error == pytest.approx(float(S[6:].norm() / S.norm()), rel=1e-4)
        f = plain.factors[path]
        assert torch.linalg.norm(f.B.double() @ f.A.double() - delta) == pytest.approx(
            float(S[6:].norm()), rel=1e-4
        )
    assert 0.005 < report.worst[1] < 0.5


def test_what_is_no_dora_is_refused() -> None:
    model, _ = trained("llama")
    with pytest.raises(AdapterError, match="plain LoRA already"):
        without_dora(model, rank=4)
    with pytest.raises(ConfigError, match="rank must be at least 1, not 0"):
        without_dora(model, rank=0)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = dora("llama")
    lorica.write(adapter, tmp_path / "dora")
    lorica.detach(model)
    model.save_pretrained(tmp_path / "base")
    refused = check_serve(tmp_path / "dora", "vllm")
    assert any("--rank" in finding.remedy for finding in refused)
    command = ["export", str(tmp_path / "dora"), "--base", str(tmp_path / "base"), "-o"]
    assert main([*command, str(tmp_path / "plain"), "--to", "vllm"]) == 1
    assert "--rank" not in capsys.readouterr().out
    assert main([*command, str(tmp_path / "plain"), "--to", "vllm", "--rank", "16"]) == 0
    assert "relative error of the update in 14 layers: worst" in capsys.readouterr().out
    assert not [finding for finding in check_serve(tmp_path / "plain", "vllm") if finding.refused]
    assert main([*command, str(tmp_path / "again"), "--to", "vllm"]) == 1
    plain = ["export", str(tmp_path / "plain"), "--to", "peft", "-o", str(tmp_path / "x"), "--rank", "2"]
    assert main(plain) == 1
    assert "has none; for less rank: lorica compress" in capsys.readouterr().err
