"""Properties of an adapter that other servers refuse or compute otherwise than in training, and remedies.

The rules are those of vLLM 0.33, SGLang and llama.cpp's `convert_lora_to_gguf.py`, read from their sources.
Nothing of theirs runs here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from lorica.checkpoint.peft import WEIGHTS_FILE, read_settings
from lorica.config import changes_base
from lorica.errors import ConfigError, FileError, listing, nearest

SERVERS = ("vllm", "sglang", "llamacpp")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""

_MERGE = "lorica merge BASE {folder} -o MERGED, and serve that model"
_PLAIN = (
    "; or make it plain LoRA of a higher rank, and see how far off that is: lorica export {{folder}} "
    "--to {to} --base BASE --rank 64 -o NEW"
)
_TARGETS = {"llamacpp": "gguf"}
"""Server → the form that `lorica export` writes for it, where that has another name."""

_FACTOR = re.compile(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$")
_HEAD = re.compile(r"(^|\.)(score|classifier)\.(weight|bias)$")
_TABLE = re.compile(r"(embed_tokens|lm_head)\.base_layer\.weight$")

# Field of the configuration → what it brings that is no A or B on a layer.
_FEATURES = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases on B",
    "trainable_token_indices": "trained rows of tokens",
    "target_parameters": "updates of stacked experts",
    "layer_replication": "blocks that share their weights",
}

_SPECIAL = {
    ("sglang", "use_dora"): "SGLang refuses the adapter",
    ("vllm", "target_parameters"): "vLLM takes {} for a few architectures, in a form of its own",
}


@dataclass(frozen=True)
class Finding:
    """Something in an adapter that a server does not take as it was trained.

    Args:
        what: field of the configuration, or tensors.
        effect: what the server does.
        remedy: a command, or a setting of the server's.
        refused: whether the adapter cannot be served, or not with its outputs; else it is a remark.
    """

    what: str
    effect: str
    remedy: str
    refused: bool = True

    def __str__(self) -> str:
        """In two lines."""
        return (
            f"{'refused' if self.refused else 'remark'}: {self.what}: {self.effect}\n  remedy: {self.remedy}"
        )


def check_serve(folder: str | Path, server: str, *, max_rank: int = 16) -> list[Finding]:
    """Everything in an adapter's folder that a server would refuse or compute otherwise.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`, lorica's or PEFT's.
        server: ``"vllm"``, ``"sglang"`` or ``"llamacpp"``.
        max_rank: the server's own limit of the rank (vLLM's --max-lora-rank, by default 16).

    Returns:
        The findings; an empty list where the adapter is served as it was trained.

    Raises:
        ConfigError: there is no such server.
        FileError: a file is missing or damaged, or the weights are in torch's pickled form.
    """
    if server not in SERVERS:
        raise ConfigError(
            f"there is no server {server!r}{nearest(server, SERVERS)}; there are: {listing(SERVERS)}"
        )
    folder = Path(folder)
    settings, shapes, dtypes = read_settings(folder), *_header(folder / WEIGHTS_FILE)
    if "method" in settings:
        method = str(settings["method"])
        return [Finding(f"method {method}", "only LoRA is served", _MERGE.format(folder=folder))]
    found = [*_features(settings, shapes, server), *_tensors(shapes, server), *_scales(settings, server)]
    found += _ranks(shapes, server, max_rank)
    if server != "llamacpp" and "F32" in dtypes:
        effect = "A and B in float32 are rounded to the served model's dtype"
        found.append(Finding("dtype", effect, "none needed; expect outputs to differ by that", refused=False))
    return [Finding(f.what, f.effect, f.remedy.format(folder=folder), f.refused) for f in found]


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Tensor's name → shape, and the dtypes."""
    if not path.is_file():
        raise FileError(
            f"{path} is not there; an adapter in torch's pickled form becomes one by: lorica export "
            f"{path.parent} --to peft -o NEW"
        )
    try:
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            return shapes, {part.get_dtype() for part in slices.values()}
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{path} is truncated or damaged: {error}") from error


def _features(settings: Mapping[str, Any], shapes: Mapping[str, object], server: str) -> Iterator[Finding]:
    stops = {
        "vllm": "vLLM refuses the adapter",
        "sglang": "SGLang loads the adapter without {}, and says nothing",
        "llamacpp": "the converter stops, or leaves {} out",
    }[server]
    for name, brings in _FEATURES.items():
        if settings.get(name):
            effect = _SPECIAL.get((server, name), stops)
            plain = _PLAIN.format(to=_TARGETS.get(server, server)) if name == "use_dora" else ""
            yield Finding(name, effect.format(brings), _MERGE + plain)
    if settings.get("bias", "none") != "none":
        yield Finding("bias", stops.format("biases of the base that were trained"), _MERGE)
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str | bool) and changes_base(init):
        yield Finding(
            f"init_lora_weights={init!r}",
            "the factors belong to a base whose weights the start changed, and the server has another",
            "lorica.load the adapter on its base and lorica.save it, which makes plain factors",
        )
    if settings.get("alora_invocation_tokens") and server != "llamacpp":
        yield Finding("alora_invocation_tokens", stops.format("the tokens that switch it on"), _MERGE)


def _tensors(shapes: Mapping[str, tuple[int, ...]], server: str) -> Iterator[Finding]:
    odd = [name for name, shape in shapes.items() if _FACTOR.search(name) and len(shape) != 2]
    if odd:
        effect = f"only linear layers and embeddings are served, not {listing(odd, limit=3)}"
        yield Finding("convolutions", effect, _MERGE)
    rest = [name for name in shapes if not _FACTOR.search(name) and not _TABLE.search(name)]
    heads = [name for name in rest if _HEAD.search(name)]
    if heads and server == "vllm":
        effect = "served by versions since August 2026, where the model is one for classification"
        yield Finding(listing(heads), effect, "an older version needs the merged model", refused=False)
        rest = [name for name in rest if name not in heads]
    known = ("lora_magnitude_vector", "lora_B.bias", "token_adapter")
    rest = [name for name in rest if not any(part in name for part in known)]
    if rest:
        effect = {
            "vllm": 'vLLM refuses the file ("is unsupported LoRA weight")',
            "sglang": "SGLang leaves these out, and says nothing",
            "llamacpp": "the converter stops at a tensor that is no A or B",
        }[server]
        yield Finding(f"trained whole: {listing(rest, limit=4)}", effect, _MERGE)


def _scales(settings: Mapping[str, Any], server: str) -> Iterator[Finding]:
    """Scales that the server does not read; vLLM reads all."""
    fields = {
        "sglang": ("use_rslora", "rank_pattern", "alpha_pattern"),
        "llamacpp": ("use_rslora", "alpha_pattern"),
    }
    target = _TARGETS.get(server, server)
    for name in fields.get(server, ()):
        if settings.get(name):
            effect = "the server reads lora_alpha alone, so the update has another scale than in training"
            yield Finding(
                name, effect, f"lorica export {{folder}} --to {target} -o NEW, which folds scales into B"
            )


def _ranks(shapes: Mapping[str, tuple[int, ...]], server: str, limit: int) -> Iterator[Finding]:
    ranks = [s[0] for name, s in shapes.items() if name.endswith((".lora_A.weight", ".lora_embedding_A"))]
    largest = max(ranks, default=0)
    if server == "llamacpp" or largest <= limit:
        return
    if server == "sglang":
        effect = f"a server that was started without an adapter of rank {largest} refuses it"
        yield Finding(f"rank {largest}", effect, f"start it with --max-lora-rank {largest}", refused=False)
        return
    enough = next((rank for rank in RANKS if rank >= largest), None)
    remedy = (
        f"start vLLM with --max-lora-rank {enough}"
        if enough
        else f"lorica compress {{folder}} --rank {RANKS[-1]} -o NEW"
    )
    yield Finding(f"rank {largest}", f"above --max-lora-rank {limit}", remedy)
