"""A transformer's blocks, and the attention and the MLP in a block."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from lorica.errors import TargetError
from lorica.layers import SwappedModule
from lorica.tree import Place, walk

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


class Sublayers(NamedTuple):
    """Modules of a block, by their paths inside it.

    Args:
        attention: those that end an attention, after its dropout and before the residual is added; a block
            may have some of them.
        mlp: the one that ends the MLP, likewise.
        norm: the LayerNorm that follows the MLP's residual sum; None where it stands before the MLP instead.
    """

    attention: tuple[str, ...]
    mlp: str
    norm: str | None = None


# As the architectures name them; the first that a block has all of, cross-attention aside, is the block's.
_SUBLAYERS = (
    # BERT, RoBERTa, ELECTRA, DeBERTa
    Sublayers(
        ("attention.output.dropout", "crossattention.output.dropout"), "output.dropout", "output.LayerNorm"
    ),
    Sublayers(("attention",), "ffn", "output_layer_norm"),  # DistilBERT
    Sublayers(
        ("layer.0.dropout",), "layer.1.dropout"
    ),  # T5's encoder; its decoder is recognised first, below
    Sublayers(("attn", "crossattention"), "mlp"),  # GPT-2
    Sublayers(("self_attn",), "mlp"),  # Llama, Mistral, Qwen, Gemma, Phi, CLIP
    # BLOOM, which adds the residuals inside these two modules; Falcon
    Sublayers(("self_attention.dense",), "mlp.dense_4h_to_h"),
    Sublayers(("self_attn", "encoder_attn"), "fc2"),  # OPT, BART, Whisper
    Sublayers(("attention",), "mlp"),  # ViT, GPT-NeoX
    Sublayers(("attention.attention",), "mlp"),
    Sublayers(("attn.attention",), "mlp"),  # GPT-Neo
)
# BART's kin call the LayerNorm of the MLP alike, whether it stands before the MLP or behind the sum.
_POST_NORM = ("Bart", "BlenderbotSmall", "LED", "Marian", "Mvp", "PLBart", "TrOCR")
_T5_DECODER = Sublayers(("layer.0.dropout", "layer.1.dropout"), "layer.2.dropout")


def stacks(root: nn.Module) -> list[list[Place]]:
    """The model's stacks of blocks, in its own order: one, or an encoder's and a decoder's.

    A stack is an `nn.ModuleList` of modules of one class, each with an attention in it.

    Raises:
        TargetError: the model has none.
    """
    found: list[list[Place]] = []
    for place in walk(root):
        if isinstance(place.module, nn.ModuleList) and len(place.module):
            inside = any(place.path.startswith(f"{block.path}.") for stack in found for block in stack)
            if not inside and _are_blocks(place.module):
                found.append(
                    [Place(f"{place.path}.{i}", block, place.module) for i, block in enumerate(place.module)]
                )
    if not found:
        raise TargetError(
            f"{type(root).__name__} has no list of transformer blocks (an nn.ModuleList of modules of one "
            "class with an attention each), on which this method works"
        )
    return found


def sublayers(block: Place) -> Sublayers:
    """The attention and the MLP of a block; cross-attention only where there is one.

    Raises:
        TargetError: lorica does not know such blocks.
    """
    has = {path for path, _ in block.module.named_modules()}
    for known in (_T5_DECODER, *_SUBLAYERS):
        if known.attention[0] in has and known.mlp in has:
            attention = tuple(path for path in known.attention if path in has)
            norm = "final_layer_norm" if _ends_in_norm(block.module) else known.norm
            return known._replace(attention=attention, norm=norm if norm in has else None)
    raise TargetError(
        f"lorica does not know where the attention and the MLP of {block.path}, a "
        f"{type(block.module).__name__}, end"
    )


def inner(block: Place, path: str) -> Place:
    """A module inside a block."""
    return Place(f"{block.path}.{path}", block.module.get_submodule(path), block.module)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before anything was swapped."""
    cls = type(module)
    while issubclass(cls, SwappedModule):
        cls = cls.base_class
    return cls


def _ends_in_norm(module: nn.Module) -> bool:
    before = getattr(module, "do_layer_norm_before", None)  # OPT says where its own is
    return own_class(module).__name__.startswith(_POST_NORM) if before is None else not before


def _are_blocks(modules: nn.ModuleList) -> bool:
    same = len({own_class(module) for module in modules}) == 1
    return same and all(
        any(_ATTENTION.search(name) for name, _ in module.named_modules()) for module in modules
    )
