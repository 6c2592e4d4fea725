"""kohya's file: names and numbers by hand, and what diffusers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorica
from lorica.cli import main
from lorica.errors import AdapterError, ConfigError
from lorica.export import part_of, write_kohya


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(6, 8), nn.Linear(6, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention()])
        self.conv1 = nn.Conv2d(3, 5, 3)


class UNet(nn.Module):
    """Names as diffusers' UNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block()])
        self.time_embedding = nn.Linear(4, 4)


def adapter(**fields: Any) -> lorica.Adapter:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"target_modules": ["to_q", "conv1"], "init_lora_weights": False, **fields}
    return lorica.extract(lorica.adapt(UNet(), lorica.LoraConfig(r=4, lora_alpha=6, **settings), seed=0))


def test_names_and_numbers(tmp_path: Path) -> None:
    value = adapter(rank_pattern={"conv1": 2}, use_rslora=True)
    assert part_of(value) == "unet"
    found = load_file(write_kohya({"unet": value}, tmp_path / "lora.safetensors"))
    assert len(found) == 3 * 2
    for path in ("down_blocks.0.attentions.0.to_q", "down_blocks.0.conv1"):
        f, name = value.factors[path], f"lora_unet_{path.replace('.', '_')}"
        down, up, alpha = (
            found[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        # Their scale is alpha over the rows of down.
        update = float(alpha) / len(down) * up.flatten(1) @ down.flatten(1)
        torch.testing.assert_close(update, f.scale * f.B.flatten(1) @ f.A.flatten(1))
    assert found["lora_unet_down_blocks_0_conv1.lora_down.weight"].shape == (2, 3, 3, 3)
    assert found["lora_unet_down_blocks_0_conv1.lora_up.weight"].shape == (5, 2, 1, 1)


def test_what_it_cannot_carry(tmp_path: Path) -> None:
    place = tmp_path / "lora.safetensors"
    with pytest.raises(AdapterError, match=r"down_blocks\.0\.attentions\.0\.to_q: DoRA"):
        write_kohya({"unet": adapter(use_dora=True)}, place)
    with pytest.raises(AdapterError, match=r"down_blocks\.0\.conv1: no layer of the part te2"):
        write_kohya({"te2": adapter()}, place)
    with pytest.raises(ConfigError, match="a part must be one of unet, te, te1, te2"):
        write_kohya({"vae": adapter()}, place)
    model = lorica.adapt(nn.Sequential(nn.Linear(2, 2)), lorica.LoraConfig(target_modules=["0"]))
    with pytest.raises(AdapterError, match="this adapter's are others: 0"):
        part_of(lorica.extract(model))
    assert not place.exists()


def test_a_text_encoders_names_on_the_command_line(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16}
    model = CLIPTextModel(CLIPTextConfig(**shape, num_hidden_layers=1, num_attention_heads=2))
    lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["q_proj"]))
    lorica.save(model, tmp_path / "te")
    out = tmp_path / "lora.safetensors"
    command = ["export", str(tmp_path / "te"), "--to", "diffusers-kohya", "-o", str(out)]
    assert main(command) == 0
    name = "text_model_encoder_layers_0_self_attn_q_proj"
    assert {key.partition(".")[0] for key in load_file(out)} == {f"lora_te_{name}"}
    assert main([*command, "--part", "te2"]) == 0
    assert {key.partition(".")[0] for key in load_file(out)} == {f"lora_te2_{name}"}


@pytest.mark.filterwarnings("ignore")  # of diffusers' own
def test_diffusers_computes_the_same(tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers", reason="needs diffusers")
    shape: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 8, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**shape).eval()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)

    def out(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(x, 1, text).sample

    base = out(unet)
    config = lorica.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_v", "to_out.0", "conv1", "proj_in"],
        rank_pattern={"conv1": 2}, init_lora_weights=False,
    )  # fmt: skip
    lorica.adapt(unet, config, seed=0)
    expected = out(unet)
    path = write_kohya({"unet": lorica.extract(unet)}, tmp_path / "lora.safetensors")
    lorica.detach(unet)
    mixin: Any = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state, alphas = mixin.lora_state_dict(str(path), unet_config=unet.config)
    mixin.load_lora_into_unet(state, alphas, unet)
    torch.testing.assert_close(out(unet), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 0.01
