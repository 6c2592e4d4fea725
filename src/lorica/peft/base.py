"""What a wrapper asks of the model in it, and does to it."""

from __future__ import annotations

from torch import Tensor, nn

from lorica.config import LoraConfig
from lorica.model.selection import HEADS
from lorica.model.structure import lora_layers, walk


def recomputes(model: nn.Module) -> bool:
    """Whether a model recomputes activations; of one that does not say it may be so."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    name = next((name for name in names if hasattr(type(model), name)), None)
    return True if name is None else bool(getattr(model, name))


def named_whole(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration with names of whole parts for what `modules_to_save` means in PEFT.

    There a name is any ending of a module's: "norm" means every ``input_layernorm`` too, and "head" an
    ``lm_head``.

    Args:
        model: the base.
        config: as it was given.
    """
    given, heads = config.modules_to_save or [], HEADS.get(config.task_type or "", ())
    paths = [place.path for place in walk(model) if place.path]
    names: list[str] = []
    for name in dict.fromkeys([*given, *heads]):
        parts = name.count(".") + 1
        endings = [".".join(path.split(".")[-parts:]) for path in paths if path.endswith(name)]
        names += endings or [name]
    names = [name for name in dict.fromkeys(names) if name in given or name not in heads]
    return config if names == given else config.replace(modules_to_save=names)


def let_gradients_in(model: nn.Module) -> None:
    """Let the embeddings' output carry gradients: a recomputed block with a frozen input would have none."""
    quantized = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
    if any(getattr(model, flag, False) for flag in quantized):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grads)  # pyright: ignore


def match_base_dtype(model: nn.Module, name: str) -> None:
    """Give an adapter's updates the dtype of the weights beside them.

    Args:
        model: the base.
        name: of the adapter.
    """
    for layer in lora_layers(model).values():
        weight = layer.base_weight
        if name in layer.scaling and weight.is_floating_point():
            more = (layer.magnitude_parameter(name), layer.bias_parameter(name))
            for parameter in (*layer.factor_parameters(name), *more):
                if parameter is not None:
                    parameter.data = parameter.data.to(weight.dtype)


def _require_grads(module: nn.Module, args: object, output: Tensor) -> None:
    output.requires_grad_(True)
