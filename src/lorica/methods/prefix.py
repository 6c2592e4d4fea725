"""Trained positions among the input's: PreEmbed at the input, PreLayer before every block.

    input     p p p │ prompt │ i i │ target         p: prefix, i: infix
    output            prompt         target         the virtual positions are taken out again

The model's head sees as many positions as went in, so labels, pooling and logits stay in place. In a causal
model the answer's first token is read from the infix's last position, where it stands behind the prompt.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorica.config import MethodConfig
from lorica.config.method import Family
from lorica.errors import ConfigError, TargetError
from lorica.inits import generator
from lorica.layers.plugins.added import Part, Plan
from lorica.methods.blocks import stacks
from lorica.methods.bottleneck import hidden_size
from lorica.methods.inserted import Inserted, PrefixedBlock, PrefixedEmbeddings, PrefixedModel
from lorica.methods.positions import context, is_causal
from lorica.pieces import register
from lorica.pieces.plugins.added import MethodKind
from lorica.tree import Place, walk
from lorica.tree import whole as whole_of


@dataclass(frozen=True, kw_only=True)
class _PrefixConfig(MethodConfig):
    """Shared by the two: the number of positions."""

    family: ClassVar[Family] = "additive"

    prefix: int = 8
    infix: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self._expect_count("prefix", 0)
        self._expect_count("infix", 0)
        if not self.prefix + self.infix:
            raise ConfigError(
                "prefix and infix are both 0, so nothing would train; give one of them a length"
            )

    @property
    def lengths(self) -> tuple[int, int]:
        """l_p and l_i."""
        return self.prefix, self.infix


@dataclass(frozen=True, kw_only=True)
class PreEmbedConfig(_PrefixConfig):
    """Trained embeddings before the prompt and behind it, which are no words: ``d·(l_p + l_i)`` parameters.

    They take up positions, so the usable context shortens by as many. Of an encoder-decoder, the encoder gets
    them. The prompt ends before the first label in a causal model that is given labels, else with the row; to
    generate with an infix takes the key-value cache. Attention maps, where asked for, show them.

    Args:
        prefix: l_p, positions before the prompt.
        infix: l_i, positions behind it.

    Raises:
        ConfigError: a value is out of range or of the wrong type.

    Source: Hu et al., 2021, §5.1, "Prefix-embedding tuning"; Li & Liang, 2021.
    """

    method: ClassVar[str] = "pre-embed"


@dataclass(frozen=True, kw_only=True)
class PreLayerConfig(_PrefixConfig):
    """Trained activations at those positions before every block: ``L·d·(l_p + l_i)`` parameters.

    What the block below makes of these positions is replaced. (Those behind the last block would reach no
    output, and at the infix would cut it off from the prompt.) Otherwise as `PreEmbedConfig`.

    Args:
        prefix: l_p, positions before the prompt.
        infix: l_i, positions behind it.

    Raises:
        ConfigError: a value is out of range or of the wrong type.

    Source: Hu et al., 2021, §5.1, "Prefix-layer tuning".
    """

    method: ClassVar[str] = "pre-layer"


class PreEmbed(MethodKind):
    """The positions, which start as embeddings of words drawn at random."""

    def plan(self, config: _PrefixConfig, root: nn.Module, whole: Collection[str], seed: int) -> Plan:  # noqa: D102
        place = _place(config, root)
        random = generator(seed, place.path)
        patches = _embeddings_of_patches(place)
        if patches is not None:
            start = _drawn(config, root, random)
            inner = Part(
                patches.path,
                patches.module,
                PrefixedEmbeddings,
                Inserted(config.lengths, start, patches.module),
            )
            return Plan(parts=[_on(config, root, place, Inserted(config.lengths)), inner])
        words = whole_of(place.module.get_input_embeddings().weight.detach())  # type: ignore[operator]
        drawn = torch.randint(len(words), (sum(config.lengths),), generator=random, device="cpu")
        part = Inserted(config.lengths, words[drawn.to(words.device)], place.module)
        return Plan(parts=[_on(config, root, place, part)])


class PreLayer(MethodKind):
    """The positions, and their activations before each block, which start small."""

    def plan(self, config: _PrefixConfig, root: nn.Module, whole: Collection[str], seed: int) -> Plan:  # noqa: D102
        place = _place(config, root)
        parts = [_on(config, root, place, Inserted(config.lengths))]
        patches = _embeddings_of_patches(place)
        if patches is not None:
            parts.append(Part(*patches[:2], PrefixedEmbeddings, Inserted(config.lengths)))
        inside = f"{place.path}." if place.path else ""
        for stack in stacks(root):
            for block in (block for block in stack if block.path.startswith(inside)):
                random = generator(seed, block.path)
                start = _drawn(config, root, random)
                parts.append(Part(*block[:2], PrefixedBlock, Inserted(config.lengths, start, block.module)))
        return Plan(parts=parts)


register(PreEmbed(), "pre-embed")
register(PreLayer(), "pre-layer")


def _place(config: _PrefixConfig, root: nn.Module) -> Place:
    """The model that gets the positions, if it has room for them."""
    found = _inner(root)
    positions = context(found.module)
    if positions is not None and sum(config.lengths) >= positions:
        raise TargetError(
            f"prefix={config.prefix} and infix={config.infix} leave no room for an input: "
            f"{type(root).__name__} has {positions} positions"
        )
    return found


def _on(config: _PrefixConfig, root: nn.Module, place: Place, part: Inserted) -> Part:
    """The part of the model that gets the positions."""
    if config.infix and _writes(root) and is_causal(place.module):
        part.__dict__["caller"] = (root,)  # whose calls' labels say where the prompt ends
    return Part(*place[:2], PrefixedModel, part)


def _drawn(config: _PrefixConfig, root: nn.Module, random: torch.Generator) -> Tensor:
    """A small start of the positions (positions, d)."""
    start = torch.empty(sum(config.lengths), hidden_size(root), device="cpu")
    return start.normal_(0.0, 0.02, generator=random)


def _writes(root: nn.Module) -> bool:
    """Whether the model is one of language, so that labels are next tokens, and -100 in the prompt."""
    head = getattr(root, "get_output_embeddings", None)
    return head is not None and head() is not None


def _inner(root: nn.Module) -> Place:
    """The model around the blocks that turns the input into hidden states; an encoder-decoder's encoder."""
    modeling = sys.modules.get("transformers.modeling_utils")
    found = stacks(root)
    if len(found) > 1 and not getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise TargetError(
            f"{type(root).__name__} has {len(found)} stacks of blocks, and it is not known which is to "
            "see a prefix; adapt the part that holds one"
        )
    first = found[0][0].path
    for place in reversed(list(walk(root))):
        holds = first.startswith(f"{place.path}.") or not place.path
        if modeling is not None and holds and isinstance(place.module, modeling.PreTrainedModel):
            takes = inspect.signature(type(place.module).forward).parameters
            if "inputs_embeds" in takes or "pixel_values" in takes:
                return place
    raise TargetError(
        f"a prefix is for transformers' models that take embeddings or images, not for {type(root).__name__}"
    )


def _embeddings_of_patches(place: Place) -> Place | None:
    if "pixel_values" not in inspect.signature(type(place.module).forward).parameters:
        return None
    path = f"{place.path}.embeddings" if place.path else "embeddings"
    return Place(path, place.module.get_submodule("embeddings"), place.module)
