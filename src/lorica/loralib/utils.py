"""Choose the parameters that train, and make checkpoints of them."""

from __future__ import annotations

from torch import Tensor, nn

from lorica.errors import ConfigError
from lorica.loralib.layers import ConvLoRA
from lorica.loralib.merging import LoRALayer, MergingLayer

_BIASES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all parameters whose names lack ``"lora_"``, except some biases.

    Args:
        model: any model.
        bias: ``"none"``: no biases train; ``"all"``: every parameter with ``"bias"`` in its name trains;
            ``"lora_only"``: the biases of layers with an update train.

    Raises:
        ConfigError: `bias` has another value; nothing was frozen.
    """
    thawed = _biases(model, bias)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = name in thawed


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The trained tensors, by their names in ``model.state_dict()``.

    ``model.load_state_dict(..., strict=False)`` loads them over the pretrained checkpoint.

    Args:
        model: any model, in training or in evaluation.
        bias: the biases to include, as in `mark_only_lora_as_trainable`.

    Returns:
        Name → tensor, sharing the model's memory.

    Raises:
        ConfigError: `bias` has another value.
    """
    chosen = _biases(model, bias)
    return {name: t for name, t in model.state_dict().items() if "lora_" in name or name in chosen}


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint for the plain model: the updates merged, and the names those of the plain model.

    Args:
        model: any model, in training or in evaluation.

    Returns:
        Name → tensor; those without an update share the model's memory.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for path, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, MergingLayer):
            continue
        prefix = f"{path}." if path else ""
        inner = f"{prefix}conv." if isinstance(layer, ConvLoRA) else prefix
        if layer.has_update:
            state[f"{inner}weight"] = layer.merged_weight()
            del state[f"{prefix}lora_A"], state[f"{prefix}lora_B"]
        if inner != prefix:
            for name in [name for name in state if name.startswith(inner)]:
                state[prefix + name.removeprefix(inner)] = state.pop(name)
    return state


def _biases(model: nn.Module, bias: str) -> set[str]:
    """Names of the biases that train."""
    if bias not in _BIASES:
        raise ConfigError(f"bias must be one of {_BIASES}, not {bias!r}")
    names = {name for name, _ in model.named_parameters(remove_duplicate=False) if "bias" in name}
    if bias == "all":
        return names
    if bias == "none":
        return set()
    owned: set[str] = set()
    for path, layer in model.named_modules(remove_duplicate=False):
        # A layer of the user's own has its factors by loralib's names.
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        if isinstance(layer, LoRALayer) and any("lora_" in name for name in own):
            prefix = f"{path}." if path else ""
            owned.add(f"{prefix}conv.bias" if isinstance(layer, ConvLoRA) else f"{prefix}bias")
    return names & owned
