"""An adapter as mlx-lm's folder, which `mlx_lm.generate --adapter-path FOLDER` loads.

    model.layers.0.self_attn.q_proj   ──▶   the same name, lora_a (d_in, r) and lora_b (r, d_out)

mlx-lm puts factors on the named modules of every block, B zero, and then loads what the file has.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lorica.adapter import Adapter
from lorica.checkpoint.atomic import replace_files, save
from lorica.errors import AdapterError, lines
from lorica.export.plain import even, unlike_plain

# Where transformers has a decoder's blocks → where mlx-lm has them.
_BLOCKS = {r"model\.layers\.(\d+)": "model.layers", r"transformer\.h\.(\d+)": "model.h"}
_BESIDE = ("lm_head", "model.embed_tokens")


def write_mlx(adapter: Adapter, folder: str | Path) -> Path:
    """Write an adapter as `adapters.safetensors` and `adapter_config.json` in mlx-lm's form, in float32.

    Args:
        adapter: LoRA on linear layers and embeddings of a decoder.
        folder: to write.

    Returns:
        The folder.

    Raises:
        AdapterError: the format cannot carry something of it; the message names all of it.
        FileError: the folder cannot be written.
    """
    adapter.check_finite()
    problems = unlike_plain(adapter, ("linear", "embedding"))
    names = {path: found for path in adapter.factors if (found := _name(path)) is not None}
    problems += [
        f"{path}: no place in a decoder of mlx-lm's" for path in adapter.factors if path not in names
    ]
    if problems:
        raise AdapterError(
            f"mlx-lm's form cannot carry this adapter:\n{lines(problems)}\nMerge it (lorica merge)"
        )
    plain = even(adapter)
    tensors = {}
    for path, f in plain.factors.items():
        name, _ = names[path]
        tensors[f"{name}.lora_a"] = f.A.detach().float().t().contiguous()
        tensors[f"{name}.lora_b"] = f.B.detach().float().t().contiguous()
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all of them
        "lora_parameters": {
            "rank": plain.lora.r,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({key for _, key in names.values()}),
        },
    }
    folder = Path(folder)
    replace_files(
        folder,
        {
            "adapters.safetensors": lambda place: save(place, tensors),
            "adapter_config.json": lambda place: place.write_text(json.dumps(config, indent=2)),
        },
    )
    return folder


def _name(path: str) -> tuple[str, str] | None:
    """A module's name in mlx-lm, and the key that it is targeted by: its name inside its block."""
    if path in _BESIDE:
        return path, path
    for blocks, there in _BLOCKS.items():
        if hit := re.match(rf"{blocks}\.", path):
            key = path[hit.end() :]
            return f"{there}.{hit[1]}.{key}", key
    return None
