"""An adapter as llama.cpp's GGUF file, which `llama-server --lora FILE` loads beside a converted base.

    model.layers.0.self_attn.q_proj   ──▶   blk.0.attn_q.weight.lora_a (r, d_in), .lora_b (d_out, r)

llama.cpp's rotary embedding turns neighbouring pairs of a head's numbers, transformers' turns halves; its
converter reorders the rows of Llama's query and key weights for that. The rows of B follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.adapter import Adapter
from lorica.checkpoint.atomic import replace_file
from lorica.errors import AdapterError, FileError, lines, listing, require
from lorica.export.plain import even, unlike_plain

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2"}
"""A configuration's `model_type` → llama.cpp's architecture, where the layout of its weights is known."""

_ROTATED = ("llama", "mistral")


def write_gguf(adapter: Adapter, base: Mapping[str, Any], path: str | Path) -> Path:
    """Write an adapter as a GGUF file, in float32.

    Args:
        adapter: LoRA on linear layers of a decoder.
        base: the fields of the base's `config.json`.
        path: of the file.

    Returns:
        The file.

    Raises:
        AdapterError: the format cannot carry something of it, or the architecture is not known here; the
            message names all of it.
        FileError: the file cannot be written.
        MissingExtra: gguf is not installed.
    """
    gguf: Any = require("gguf", extra="export")
    kind, path = str(base.get("model_type")), Path(path)
    if kind not in ARCHITECTURES:
        raise AdapterError(
            f"a GGUF file is written for {listing(ARCHITECTURES)}, and the base is a {kind}; merge the "
            "adapter (lorica merge) and convert the model with llama.cpp's convert_hf_to_gguf.py"
        )
    blocks = int(base.get("num_hidden_layers") or base["n_layer"])
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind])
    names = gguf.get_tensor_name_map(arch, blocks)
    adapter.check_finite()
    if problems := unlike_plain(adapter, ("linear",)):
        raise AdapterError(
            f"a GGUF file holds A and B of linear layers alone:\n{lines(problems)}\nMerge the adapter "
            "(lorica merge) and convert the model with llama.cpp's convert_hf_to_gguf.py"
        )
    factors = even(adapter).factors
    placed = {key: names.get_name(f"{key}.weight", try_suffixes=(".weight",)) for key in factors}
    problems = [f"{key} has no name in llama.cpp's {kind}" for key, name in placed.items() if name is None]
    if base.get("tie_word_embeddings", kind == "gpt2") and "lm_head" in factors:
        problems.append("lm_head is tied to the embedding, and llama.cpp has no weight of its own for it")
    if problems:
        raise AdapterError(f"a GGUF file cannot carry this adapter:\n{lines(problems)}")

    def write(place: Path) -> None:
        writer = gguf.GGUFWriter(place, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # The scale there is alpha over the rank of each tensor: 1.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(next(iter(factors.values())).r))
        for key, f in factors.items():
            B = f.B.float()
            if kind in _ROTATED and key.endswith(("q_proj", "k_proj")):
                B = _in_pairs(B, _heads(base, key))
            writer.add_tensor(f"{placed[key]}.lora_a", f.A.float().contiguous().numpy())
            writer.add_tensor(f"{placed[key]}.lora_b", B.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _heads(base: Mapping[str, Any], path: str) -> int:
    queries = int(base["num_attention_heads"])
    return queries if path.endswith("q_proj") else int(base.get("num_key_value_heads") or queries)


def _in_pairs(B: Tensor, heads: int) -> Tensor:
    """Rows of each head, first half and second half, in turn."""
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
