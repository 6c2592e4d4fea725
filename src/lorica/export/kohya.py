"""An adapter of a diffusion pipeline as kohya's file, which diffusers, ComfyUI and others load.

    down_blocks.0.attentions.0.proj_in  ──▶  lora_unet_down_blocks_0_attentions_0_proj_in
                                             .lora_down.weight  A      .lora_up.weight  B      .alpha  scale·r

Readers divide alpha by the rank of each layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorica.adapter import Adapter
from lorica.checkpoint.atomic import replace_file, save
from lorica.errors import AdapterError, ConfigError, lines, listing
from lorica.export.plain import unlike_plain

PARTS = {"unet": "lora_unet", "te": "lora_te", "te1": "lora_te1", "te2": "lora_te2"}
"""A pipeline's part → what its names begin with: the UNet, the text encoder, or SDXL's two."""

_KNOWN = {
    "unet": re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b"),
    "te": re.compile(r"(text_model\.)?(encoder|final_layer_norm|embeddings)\."),
}
"""The beginning of a part's paths, in diffusers and transformers."""


def part_of(adapter: Adapter) -> str:
    """The part of a pipeline that an adapter's paths are of: ``"unet"`` or ``"te"``.

    Raises:
        AdapterError: they are of neither.
    """
    for part, known in _KNOWN.items():
        if adapter.factors and all(known.match(path) for path in adapter.factors):
            return part
    other = next((p for p in adapter.factors if not any(k.match(p) for k in _KNOWN.values())), "it has none")
    raise AdapterError(
        f"kohya's form names the layers of a UNet or of a CLIP text encoder, as diffusers and transformers "
        f"have them; this adapter's are others: {other}"
    )


def write_kohya(parts: Mapping[str, Adapter], path: str | Path) -> Path:
    """Write the adapters of a pipeline's parts as one safetensors file, each tensor in its own dtype.

    Args:
        parts: of `PARTS` → LoRA on linear layers and convolutions of it.
        path: of the file.

    Returns:
        The file.

    Raises:
        AdapterError: the format cannot carry something of it; the message names all of it.
        ConfigError: there is no such part, or none is given.
        FileError: the file cannot be written.
    """
    if unknown := [part for part in parts if part not in PARTS] or ([] if parts else ["none"]):
        raise ConfigError(f"a part must be one of {listing(PARTS)}, not {listing(unknown)}")
    tensors: dict[str, Tensor] = {}
    problems = []
    for part, adapter in parts.items():
        adapter.check_finite()
        problems += unlike_plain(adapter, ("linear", "conv"))
        problems += [
            f"{key}: a convolution in {f.groups} groups" for key, f in adapter.factors.items() if f.groups > 1
        ]
        known = _KNOWN[part[:2] if part != "unet" else part]
        for key, f in adapter.factors.items():
            if not known.match(key):
                problems.append(f"{key}: no layer of the part {part}")
                continue
            whole = key if part == "unet" or key.startswith("text_model.") else f"text_model.{key}"
            name = f"{PARTS[part]}_{whole.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = f.A.detach().contiguous()
            tensors[f"{name}.lora_up.weight"] = f.B.detach().contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(f.scale * f.r)
    if problems:
        raise AdapterError(
            f"kohya's form cannot carry this adapter:\n{lines(problems)}\nMerge it (lorica merge)"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda place: save(place, tensors))
    return path
