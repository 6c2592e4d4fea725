"""mlx-lm itself reads the folder, on a CPU, and computes what torch does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_gguf import FAMILIES, trained

import lorica
from lorica.cli import main
from lorica.errors import AdapterError
from lorica.export import write_mlx

pytest.importorskip("mlx_lm", reason="needs mlx-lm and mlx[cpu]")


@pytest.mark.filterwarnings("ignore")  # of mlx-lm's own
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_logits(name: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    fields = {"rank_pattern": {"(down_proj|c_fc)": 2}, "alpha_pattern": {r".*\.0\..*": 3}, "use_rslora": True}
    model, adapter = trained(name, **fields, exclude_modules=r".*\.1\.mlp.*")  # one block has less
    lorica.detach(model)
    getattr(model, "transformer", model).save_pretrained(tmp_path / "base")  # GPT-2 as the Hub has it
    lorica.attach(model.eval(), adapter)
    ids = torch.randint(0, 32, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        with lorica.disabled(model):
            base = model(ids).logits
    # Transformers 5 writes these elsewhere, or not.
    there, _ = load_model(tmp_path / "base", model_config={"rope_theta": 10000.0, "n_ctx": 16})
    given = mx.array(ids.numpy())
    torch.testing.assert_close(torch.tensor(there(given).tolist()), base, rtol=1e-4, atol=1e-4)
    load_adapters(there, str(write_mlx(adapter, tmp_path / "mlx")))
    there.eval()
    torch.testing.assert_close(torch.tensor(there(given).tolist()), expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 0.05


def test_what_it_cannot_carry(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"target_modules": ["q_proj"], "use_dora": True}, r"layers\.0\.self_attn\.q_proj: DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"lm_head\.weight: trained whole"),
    ]
    for fields, message in cases:
        with pytest.raises(AdapterError, match=message):
            write_mlx(trained("llama", **fields)[1], tmp_path / "mlx")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(AdapterError, match="0: no place in a decoder of mlx-lm's"):
        write_mlx(
            lorica.extract(lorica.adapt(model, lorica.LoraConfig(target_modules=["0"]))), tmp_path / "mlx"
        )
    assert not list(tmp_path.iterdir())


def test_on_the_command_line(tmp_path: Path) -> None:
    lorica.write(trained("qwen2")[1], tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--to", "mlx", "-o", str(tmp_path / "mlx")]) == 0
    settings = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert settings["lora_parameters"]["keys"][0] == "mlp.down_proj"
