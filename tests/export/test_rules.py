from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_plain import adapter
from torch import nn

import lorica
from lorica.cli import main
from lorica.export import SERVERS, check_serve


def refused(folder: Path, server: str, **options: Any) -> list[str]:
    return [finding.what for finding in check_serve(folder, server, **options) if finding.refused]


@pytest.mark.parametrize("server", SERVERS)
def test_plain_lora_is_served_everywhere(server: str, tmp_path: Path) -> None:
    lorica.write(adapter(), tmp_path)
    assert refused(tmp_path, server) == []
    assert main(["check-serve", str(tmp_path), "--for", server]) == 0


CASES: list[tuple[dict[str, Any], dict[str, list[str]]]] = [
    ({"use_dora": True}, {"vllm": ["use_dora"], "sglang": ["use_dora"], "llamacpp": ["use_dora"]}),
    ({"lora_bias": True}, {server: ["lora_bias"] for server in SERVERS}),
    ({"use_rslora": True}, {"vllm": [], "sglang": ["use_rslora"], "llamacpp": ["use_rslora"]}),
    ({"rank_pattern": {"0": 2}}, {"vllm": [], "sglang": ["rank_pattern"], "llamacpp": []}),
    (
        {"alpha_pattern": {"0": 2}},
        {"vllm": [], "sglang": ["alpha_pattern"], "llamacpp": ["alpha_pattern"]},
    ),
    ({"r": 20}, {"vllm": ["rank 20"], "sglang": [], "llamacpp": []}),
]


@pytest.mark.parametrize(("fields", "expected"), CASES)
def test_each_feature(fields: dict[str, Any], expected: dict[str, list[str]], tmp_path: Path) -> None:
    lorica.write(adapter(**{"target_modules": ["0", "1"], **fields}), tmp_path / "a")
    assert {server: refused(tmp_path / "a", server) for server in SERVERS} == expected
    scales = {"use_rslora", "rank_pattern", "alpha_pattern"}
    for server in ("vllm", "sglang"):  # what export mends is mended, and what it cannot mend it refuses
        left = [what for what in refused(tmp_path / "a", server, max_rank=512) if what not in scales]
        done = main(["export", str(tmp_path / "a"), "--to", server, "-o", str(tmp_path / server)])
        assert done == bool(left)
        assert (tmp_path / server).exists() == (not left)
        if not left:
            assert refused(tmp_path / server, server, max_rank=512) == []


def test_ranks_name_what_vllm_takes(tmp_path: Path) -> None:
    lorica.write(adapter(r=20), tmp_path / "20")
    (finding,) = [f for f in check_serve(tmp_path / "20", "vllm") if f.refused]
    assert finding.remedy == "start vLLM with --max-lora-rank 32"
    assert refused(tmp_path / "20", "vllm", max_rank=32) == []
    lorica.write(adapter(r=600), tmp_path / "600")
    (finding,) = [f for f in check_serve(tmp_path / "600", "vllm", max_rank=512) if f.refused]
    assert finding.remedy == f"lorica compress {tmp_path / '600'} --rank 512 -o NEW"


def test_what_is_trained_whole(tmp_path: Path) -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "score": nn.Linear(4, 2), "other": nn.Linear(4, 4)})
    for name in ("score", "other"):
        made = lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["q"], modules_to_save=[name]))
        lorica.save(made, tmp_path / name)
        lorica.detach(model)
    head, other = (check_serve(tmp_path / name, "vllm") for name in ("score", "other"))
    assert any("score.weight" in f.what for f in head)
    assert not any(f.refused for f in head)
    assert any("other.weight" in f.what and f.refused for f in other)
    assert any("score.weight" in f.what for f in check_serve(tmp_path / "score", "llamacpp") if f.refused)


def test_starts_tokens_and_other_methods(tmp_path: Path) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "q": nn.Linear(4, 4)})
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"table": [1]}))
    lorica.save(model, tmp_path / "tokens")
    assert refused(tmp_path / "tokens", "vllm") == ["trainable_token_indices"]
    lorica.detach(model)
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa"))
    lorica.save(model, tmp_path / "plain")
    lorica.save(model, tmp_path / "start", as_trained=True)
    assert refused(tmp_path / "plain", "vllm") == []
    assert refused(tmp_path / "start", "vllm") == ["init_lora_weights='pissa'"]
    lorica.detach(model)
    lorica.adapt(model, lorica.BitFitConfig())
    lorica.save(model, tmp_path / "bitfit")
    assert refused(tmp_path / "bitfit", "sglang") == ["method bitfit"]


def test_convolutions_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lorica.write(adapter(model=nn.Sequential(nn.Conv2d(3, 4, 3)), target_modules=["0"]), tmp_path / "conv")
    assert refused(tmp_path / "conv", "vllm") == ["convolutions"]
    with pytest.raises(lorica.LoricaError, match="no server 'vlm'; did you mean 'vllm'"):
        check_serve(tmp_path / "conv", "vlm")
    capsys.readouterr()
    assert main(["check-serve", str(tmp_path / "conv"), "--for", "vllm", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == [dataclasses.asdict(finding) for finding in check_serve(tmp_path / "conv", "vllm")]
    (tmp_path / "conv" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(lorica.LoricaError, match="truncated or damaged"):
        check_serve(tmp_path / "conv", "vllm")


def test_half_precision_needs_no_remark(tmp_path: Path) -> None:
    made = adapter(target_modules=["0"])
    halved = {p: dataclasses.replace(f, A=f.A.half(), B=f.B.half()) for p, f in made.factors.items()}
    lorica.write(dataclasses.replace(made, factors=halved), tmp_path)
    assert check_serve(tmp_path, "vllm") == []
    lorica.write(made, tmp_path)
    assert [f.what for f in check_serve(tmp_path, "vllm")] == ["dtype"]
    assert torch.float32 in {f.A.dtype for f in made.factors.values()}
