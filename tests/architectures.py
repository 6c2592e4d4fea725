"""transformers' architectures made tiny from their default configurations, by rules on the fields' names.

What the rules do not make a running model of is left to whoever calls (`Unbuilt`, with the reason).
"""

from __future__ import annotations

import inspect
import random
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

MODELS: dict[str, Mapping[str, Any]] = {"base": MODEL_MAPPING_NAMES, "lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
ALL = sorted((head, name) for head, names in MODELS.items() for name in names if name in CONFIG_MAPPING_NAMES)


class Unbuilt(Exception):
    """The rules make no running model of it."""


def running(head: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model in float64 with random weights, in evaluation mode, and inputs on which it runs.

    Raises:
        Unbuilt: no way of making it small gives a model that runs, and the same each time.
    """
    reasons = []
    for shrink in (_small, _shallow):
        for length in (9, 16):
            try:
                model = _model(head, name, shrink)
                inputs = _inputs(model, length)
                first, second = (outputs(model, inputs).detach() for _ in range(2))
            except Exception as error:  # whatever a configuration that nobody meant leads to
                reasons.append(f"{type(error).__name__}: {error}"[:200])
                continue
            if first.numel() and first.isfinite().all() and torch.equal(first, second):
                return model, inputs
            reasons.append("no output, not finite, or another each time")
    raise Unbuilt(f"{name}: {'; '.join(dict.fromkeys(reasons))}")


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """All floating-point tensors of a model's output in a row, with the same random numbers each time."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flat(model(**inputs))


def flat(output: Any) -> Tensor:
    """All floating-point tensors in an output, in float64, one after the other."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *_tensors(output)])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.double().flatten()] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for key, part in value.items() if "past_key" not in str(key) for t in _tensors(part)]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _model(head: str, name: str, shrink: Any) -> nn.Module:
    config = tiny_config(name, shrink)
    classes = MODELS[head][name]
    cls = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
        if size > (8e6 if shrink is _small else 4e7):
            raise Unbuilt(f"{size / 1e6:.0f} million parameters")
        model = cls(config).eval().double()
    random_numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                width = parameter.shape[-1] if parameter.dim() == 2 else 36
                parameter.normal_(0, 0.5 / width**0.5, generator=random_numbers)
            elif not parameter.any():
                parameter.normal_(0, 0.1, generator=random_numbers)
    return model


def tiny_config(name: str, shrink: Any = None) -> Any:
    """The architecture's own configuration with small numbers."""
    cls = getattr(transformers, CONFIG_MAPPING_NAMES[name])
    fields = (shrink or _small)(cls().to_dict())
    fields.pop("model_type", None)
    config = cls(**fields)
    parts = [
        config,
        *(part for part in vars(config).values() if isinstance(part, transformers.PreTrainedConfig)),
    ]
    for part in parts:
        part._experts_implementation = part._attn_implementation = "eager"
    return config


_UNTOLD = ("transformers_version", "_name_or_path", "architectures", "dtype", "id2label", "label2id")
_DERIVED = ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices", "per_layer_config")
_COUNTED = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_CHOSEN = (
    r"(.*_)?(num_experts_per_tok|moe_topk|top_k_experts|moe_top_k|num_experts_per_token|num_selected_experts|moe_k|"
    r"router_top_k)"
)
_SMALLER: tuple[tuple[str, int], ...] = (  # the first that matches
    (r".*kv_heads.*|.*num_key_value.*|" + _CHOSEN, 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"rotary_dim.*", 8),
    (r".*shared_layers", 0),
    (r"max_source_positions", 16),
    (r".*experts.*|.*type_vocab_size|(.*_)?n(um)?_(.*_)?heads?|.*attention_heads|n_head|.*num_heads", 4),
    (r".*codebook_size.*", 64),
    (r".*vocab.*size.*|.*num_embeddings.*", 99),
    (r".*position.*|.*max_.*(length|len|size).*|n_positions|n_ctx|seq_length|max_seq_len", 64),
    (r".*(layers|n_layer|blocks|num_stages)|.*depth|.*num_layers.*", 2),
    (r".*(head_dim|head_size|d_kv|kv_channels).*|.*lora_rank.*|.*_rank", 8),
    (r".*(intermediate|ffn|inner|d_ff|feed_forward|mlp_dim|fc_dim|mlp_hidden).*", 48),
    (r".*hidden.*|.*d_model|n_embd|.*_dim|dim|.*_size|.*channels|.*width|.*(d_text|d_vision)|n_embed", 32),
)
_KEPT = re.compile(
    r".*(token_id|_id|patch_size|kernel|stride|group|num_labels|window|chunk|block_size|tile|ratio|factor|mult|"
    r"expand|state_size|merge|num_channels|in_channels|mel|sampling|fps|frames|n_fft|hop|feature_size|"
    r"resolution|image_token|patches|eos|bos|pad|scale|downsample|local_attention|feat_extract|period|offset|num_queries|every|"
    r"interval|conv_dim).*"
)


def _small(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Everything small: two layers, widths of 32."""
    return _shrunk(fields, _smaller)


def _shallow(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers, few experts and words; the widths as they are, as they often fit one another alone."""
    return _shrunk(fields, _fewer)


def _shrunk(fields: Mapping[str, Any], number: Any) -> dict[str, Any]:
    layers = next((n for key in _COUNTED if isinstance(n := fields.get(key), int)), 0)
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if not isinstance(name, str) or name in _UNTOLD or name in _DERIVED:
            continue
        if isinstance(value, Mapping):
            nested = "config" in name or "model_type" in value
            result[name] = _shrunk(value, number) if nested else dict(value)
            if number is _smaller and "mrope_section" in value:
                result[name]["mrope_section"] = [2, 1, 1]
        elif isinstance(value, (list, tuple)) and layers > 2 and len(value) == layers:
            kinds = list(dict.fromkeys(value))  # one of each kind of layer, if two will do
            result[name] = kinds[:2] if len(kinds) > 1 else list(value[:2])
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            result[name] = 1 if _is_token(name) and value >= 99 else number(name, value)
        else:
            result[name] = _smaller_list(name, value) if number is _smaller else value
    return _fitted(fields, result) if number is _smaller else result


def _fitted(fields: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What must fit together, brought to fit."""
    heads, shared = "num_attention_heads", "num_key_value_heads"
    if heads in result and fields.get(heads) == fields.get(shared):
        result[shared] = result[heads]
    inner = result.get("hidden_size", 0) * (result.get("mamba_expand") or result.get("expand") or 0)
    for count, width in (("mamba_n_heads", "mamba_d_head"), ("num_heads", "head_dim")):
        if inner and isinstance(inner, int) and count in result and width in result:
            result[width] = inner // result[count]
    return result


def _is_token(name: str) -> bool:
    return name.endswith("_token_id") or name in (
        "pad_index",
        "padding_idx",
        "bos_index",
        "eos_index",
        "unk_index",
    )


def _smaller(name: str, value: int) -> int:
    if name in ("image_size", "input_size", "img_size"):
        return min(value, 32)
    if name in ("n_groups", "mamba_n_groups", "mamba_ngroups"):
        return 1
    if _KEPT.fullmatch(name):
        return value
    return min(value, next((most for pattern, most in _SMALLER if re.fullmatch(pattern, name)), value))


def _smaller_list(name: str, value: Any) -> Any:
    numbers = isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value)
    if not numbers or _KEPT.fullmatch(name):
        return value
    kinds = ((r".*(depth|layers).*", 1), (r".*head.*", 2), (r".*(hidden|dim|size|channel|embed).*", 32))
    most = next((most for pattern, most in kinds if re.fullmatch(pattern, name)), None)
    return value if most is None else [min(item, most) for item in value]


def _fewer(name: str, value: int) -> int:
    rules = (
        (_CHOSEN, 2),
        (r"n_group|topk_group|num_expert_group", 1),
        (r".*experts.*", 4),
        (r".*(?<!type_)vocab.*size.*", 99),
        (r".*(num_|n_)(.*_)?layers?|depth|n_layer|.*num_blocks|.*_layers", 2),
        (r".*shared_layers", 0),
        (r".*feat_extract.*", 99),
        (r".*max_position.*|n_positions|n_ctx|max_seq.*", 512),
        (r".*(intermediate|ffn|d_ff).*", 128),
    )
    return min(value, next((most for pattern, most in rules if re.fullmatch(pattern, name)), value))


def _inputs(model: Any, length: int, batch: int = 2) -> dict[str, Any]:
    config, takes = model.config, inspect.signature(model.forward).parameters
    drawn = torch.Generator().manual_seed(0)
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "audio_config", "encoder"))]

    def told(*names: str, default: Any = None) -> Any:
        found = (getattr(part, name, None) for part in parts for name in names if part is not None)
        return next((value for value in found if value is not None), default)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    words = getattr(config.get_text_config(), "vocab_size", None) or 50
    ids = torch.randint(3, max(min(words, 90), 5) - 1, (batch, length), generator=drawn)
    size = told("image_size", "input_size", default=32)
    height, width = (size[0], size[-1]) if isinstance(size, (list, tuple)) else (size, size)
    frames = told("max_source_positions")
    made = {
        "input_ids": lambda: ids,
        "decoder_input_ids": lambda: ids,
        "pixel_values": lambda: floats(batch, told("num_channels", "in_channels", default=3), height, width),
        "input_values": lambda: floats(batch, 4000),
        "input_features": lambda: floats(
            batch, told("num_mel_bins", "feature_size", default=80), 2 * frames if frames else 64
        ),
        "bbox": lambda: torch.randint(0, 20, (batch, length, 4), generator=drawn).cumsum(-1),
    }
    main = getattr(model, "main_input_name", "input_ids")
    both = any(kind in config.model_type for kind in ("clip", "siglip"))  # they compare the two
    wanted = [main, "decoder_input_ids", "bbox", *(("input_ids", "pixel_values") if both else ())]
    wanted += [name for name, one in takes.items() if name in made and one.default is inspect.Parameter.empty]
    inputs = {name: made[name]() for name in dict.fromkeys(wanted) if name in takes and name in made}
    return {**inputs, **({"use_cache": False} if "use_cache" in takes else {})}
