"""Adapters of other libraries, as those write them: each is named, and none is called damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorica
from lorica.checkpoint import loralib
from lorica.errors import FileError, LoricaError

FACTORS = torch.ones(2, 8), torch.ones(8, 2)
MLX = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 2, "scale": 20.0, "keys": ["q_proj"]},
}
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return dict(zip(names, (t.clone() for t in FACTORS), strict=False))


def folder(path: Path, config: dict[str, Any] | None, file: str, **weights: torch.Tensor) -> Path:
    path.mkdir()
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    if file.endswith(".pt"):
        torch.save(weights, path / file)
    else:
        save_file(weights, path / file)
    return path


def net() -> nn.Module:
    return nn.ModuleDict({"q_proj": nn.Linear(8, 8)})


FOLDERS: dict[str, tuple[dict[str, Any] | None, str, tuple[str, str], str]] = {
    "MLX": (MLX, "adapters.safetensors", ("q_proj.lora_a", "q_proj.lora_b"), "of MLX's; mlx_lm.fuse"),
    "diffusers": (
        None,
        "pytorch_lora_weights.safetensors",
        ("unet.q_proj.lora_A.weight", "unet.q_proj.lora_B.weight"),
        "of diffusers'",
    ),
    "torchtune": (PEFT, "adapter_0.pt", ("q_proj.lora_a.weight", "q_proj.lora_b.weight"), "of torchtune's"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_libraries(name: str, tmp_path: Path) -> None:
    config, file, names, message = FOLDERS[name]
    path = folder(tmp_path / name, config, file, **tensors(*names))
    model = net()
    with pytest.raises(FileError, match=rf"{name} is an adapter {message}.* lorica reads PEFT's folders"):
        lorica.load(model, path)
    assert not lorica.adapters(model)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"), "of kohya's sd-scripts"),
        (("unet.x.lora_A.weight", "unet.x.lora_B.weight"), "of diffusers'"),
        (("layers.0.q_proj.lora_a", "layers.0.q_proj.lora_b"), "of MLX's"),
        (("x.weight", "y.weight"), "a file, where an adapter's folder is due"),
    ],
)
def test_files_of_other_libraries(names: tuple[str, str], message: str, tmp_path: Path) -> None:
    save_file(tensors(*names), tmp_path / "lora.safetensors")
    with pytest.raises(FileError, match=message) as found:
        lorica.load(net(), tmp_path / "lora.safetensors")
    assert "damaged" not in str(found.value)


@pytest.mark.parametrize("alpha", [None, 4.0])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("lora_unet_x.lora_down.weight", "lora_unet_x.alpha"), "of kohya's sd-scripts"),
        (("unet.x.lora_A.weight", "unet.x.lora_B.weight"), "of diffusers'"),
        (("layers.0.q_proj.lora_a", "layers.0.q_proj.lora_b"), "of MLX's"),
        (("q_proj.lora_a.weight", "q_proj.lora_b.weight"), "of torchtune's"),
        (("x.lora_A.weight", "x.lora_B.weight"), "not a loralib adapter"),
        (("x.weight", "y.weight"), "there is no lora_A or lora_B in it"),
    ],
)
def test_none_is_taken_for_loralibs(
    names: tuple[str, str], message: str, suffix: str, alpha: float | None, tmp_path: Path
) -> None:
    file = tmp_path / f"lora.{suffix}"
    save_file(tensors(*names), file) if suffix == "safetensors" else torch.save(tensors(*names), file)
    with pytest.raises(LoricaError, match=message) as found:
        loralib.read(file, alpha)
    assert "is a checkpoint of loralib's" not in str(found.value)


def test_a_file_of_an_adapter_is_not_its_folder(tmp_path: Path) -> None:
    lorica.save(lorica.adapt(net(), lorica.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "mine")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        with pytest.raises(FileError, match=r"is a file of an adapter; give its folder, .*mine"):
            lorica.read(tmp_path / "mine" / file)
    (tmp_path / "note.txt").write_text("no adapter")
    with pytest.raises(FileError, match="a file, where an adapter's folder is due"):
        lorica.read(tmp_path / "note.txt")
