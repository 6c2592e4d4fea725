"""Trained positions among the input's: PreEmbed at the input, PreLayer before every block.

    input     p p p │ prompt │ i i │ target         p: prefix, i: infix
    output            prompt         target         the virtual positions are taken out again

The model's head sees as many positions as went in, so labels, pooling and logits stay in place. In a causal
model the answer's first token is read from the infix's last position, where it stands behind the prompt.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica import init
from lorica.baselines.blocks import stacks
from lorica.baselines.bottleneck import hidden_size
from lorica.config import MethodConfig
from lorica.config.method import Family
from lorica.errors import AdapterError, ConfigError, StateError, TargetError
from lorica.layers.added import AddedModule, Part, Plan, like
from lorica.model.structure import Place, walk
from lorica.roster import Roster

_NOTE = "lorica_inserted"


class Layout(NamedTuple):
    """Where things stand in a running forward.

    Args:
        tokens: columns of the input's own positions (batch, tokens).
        virtual: columns of the prefix, then of the infix (batch, l_p + l_i).
        read: columns that the head reads (batch, tokens).
    """

    tokens: Tensor
    virtual: Tensor
    read: Tensor


class Inserted(nn.Module):
    """Positions inserted before and behind the prompt, and their vectors if they have any."""

    prefix: Parameter | None
    infix: Parameter | None

    def __init__(
        self, lengths: tuple[int, int], vectors: Tensor | None = None, host: nn.Module | None = None
    ):
        super().__init__()
        self.lengths = lengths
        before, behind = (None, None) if vectors is None else vectors.split(lengths)
        for name, part in (("prefix", before), ("infix", behind)):
            given = part is not None and len(part) and host is not None
            self.register_parameter(name, like(host, part.clone()) if given else None)  # type: ignore[arg-type]

    def vectors(self, d: int, x: Tensor) -> Tensor:
        """All vectors (l_p + l_i, d), in the precision of x; zero where a block's are put in their place."""
        parts = [part.to(x.dtype) for part in (self.prefix, self.infix) if part is not None]
        return torch.cat(parts) if parts else x.new_zeros(sum(self.lengths), d)


class NoteLabels:
    """Notes a call's labels, which say where the prompt ends, for the model inside."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note them."""
        self.roster.labels = kwargs.get("labels")


class PrefixedModel(AddedModule):
    """The model inside a task's: the virtual positions are put in before it runs, and taken out after."""

    own_modules = ("inserted",)
    own_attributes = ("roster", "noting")

    def prepare(self) -> None:
        """As `AddedModule.prepare`; nothing is noted yet."""
        super().prepare()
        self.__dict__["noting"] = None

    def add_part(self, name: str, part: nn.Module) -> None:
        """Take an adapter's part; with an infix, have the labels of each call noted."""
        super().add_part(name, part)
        caller = part.__dict__.pop("caller", None)
        if caller is not None and self.__dict__["noting"] is None:
            note = NoteLabels(self.roster)
            self.__dict__["noting"] = caller[0].register_forward_pre_hook(note, with_kwargs=True)

    def remove_part(self, name: str) -> None:
        """Drop an adapter's part."""
        super().remove_part(name)
        if not self.parts and self.__dict__["noting"] is not None:
            self.__dict__["noting"].remove()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        base = cls.__dict__.get("base_class")
        if base is not None:
            # Trainers and `generate` look up the arguments that a model takes.
            @functools.wraps(base.forward)
            def forward(self: PrefixedModel, *args: Any, **kwargs: Any) -> Any:
                return self._run(args, kwargs)

            cls.forward = forward

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for the input's own positions."""
        part = self.acting_part(Inserted)
        if part is None:
            return super().forward(*args, **kwargs)
        call = _by_name(self, args, kwargs)
        as_tuple = call.pop("return_dict", None) is False
        labels, self.roster.labels = self.roster.labels, None
        cache = call.get("past_key_values")
        cached = cache.get_seq_length() if cache is not None else 0
        if cached:
            self._continue(part, call, cached)
            output = super().forward(**call, return_dict=True)
        else:
            mask = None
            if call.get("pixel_values") is None:  # else the embeddings insert, which know the patches
                self.roster.layout, mask = self._insert(part, call, labels)
            try:
                output = super().forward(**call, return_dict=True)
                _take_out(self, output, self.roster.layout)
            finally:
                self.roster.layout = None
            cache = output.get("past_key_values")
            if cache is not None:
                setattr(cache, _NOTE, mask)
        return output.to_tuple() if as_tuple else output

    def _insert(self, part: Inserted, call: dict[str, Any], labels: Tensor | None) -> tuple[Layout, Tensor]:
        """Put the virtual positions into a call's arguments; returns where, and the mask with them."""
        x = call.get("inputs_embeds")
        if x is None:
            ids = call.pop("input_ids")
            x = self.get_input_embeddings()(ids)  # type: ignore[operator]
        call.pop("input_ids", None)
        given = call.get("attention_mask")
        if given is not None and (not isinstance(given, Tensor) or given.dim() != 2):
            raise StateError(
                f"a {'prefix' if part.lengths[0] else 'infix'} needs an attention mask of (batch, tokens), "
                "and this one has another; leave out a compiled or static cache"
            )
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if given is None else given.long()
        _check_room(self, x.shape[1], part)
        positions = call.get("position_ids")
        if given is None and positions is not None and bool((positions.diff(dim=-1) <= 0).any()):
            raise StateError(
                "position_ids start again inside a row: rows are packed, and a prefix can stand only before "
                "the first of them; turn packing off"
            )
        layout = _layout(mask, labels, part.lengths, causal=_is_causal(self))
        rows, columns = mask.shape[0], mask.shape[1] + sum(part.lengths)
        vectors = part.vectors(x.shape[-1], x).expand(rows, -1, -1)
        call["inputs_embeds"] = _put(
            _put(x.new_zeros(rows, columns, x.shape[-1]), layout.tokens, x), layout.virtual, vectors
        )
        mask = mask.new_ones(rows, columns).scatter(1, layout.tokens, mask)
        if given is not None:
            call["attention_mask"] = mask.to(given.dtype)
        if call.get("token_type_ids") is not None:
            kinds = call["token_type_ids"]
            call["token_type_ids"] = kinds.new_zeros(rows, columns).scatter(1, layout.tokens, kinds)
        self._number(call, mask, columns)
        return layout, mask

    def _continue(self, part: Inserted, call: dict[str, Any], cached: int) -> None:
        """Make a call that goes on from a cache count the virtual positions in it."""
        mask = getattr(call["past_key_values"], _NOTE, None)
        if mask is None:
            raise StateError(
                "the key-value cache was filled without the prefix; start again with the adapter acting"
            )
        x = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        new = cached + x.shape[1] - mask.shape[1]
        _check_room(self, cached + x.shape[1] - sum(part.lengths), part)
        given = call.get("attention_mask")
        tail = mask.new_ones(mask.shape[0], new) if given is None else given[:, -new:].to(mask)
        call["attention_mask"] = full = torch.cat([mask, tail], dim=1)
        self._number(call, full, x.shape[1])

    def _number(self, call: dict[str, Any], mask: Tensor, last: int) -> None:
        """Give the last columns their positions, counted over what is attended to."""
        if "position_ids" in inspect.signature(type(self).forward).parameters:
            counted = (mask.cumsum(1) - 1).clamp(min=0)
            call["position_ids"] = counted[:, -last:] + _first_position(self)


class PrefixedEmbeddings(AddedModule):
    """A vision model's embeddings of patches, with the virtual positions around them."""

    own_modules = ("inserted",)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The patches between prefix and infix."""
        x = super().forward(*args, **kwargs)
        part = self.acting_part(Inserted)
        if part is None:
            return x
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        self.roster.layout = _layout(mask, None, part.lengths, causal=False)
        before, behind = part.vectors(x.shape[-1], x).expand(len(x), -1, -1).split(part.lengths, dim=1)
        return torch.cat([before, x, behind], dim=1)


class PrefixedBlock(AddedModule):
    """A block before which the activations at the virtual positions are replaced by trained ones."""

    own_modules = ("inserted",)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block makes of them."""
        part, layout = self.acting_part(Inserted), self.roster.layout
        if part is not None and layout is not None:
            if self.training and getattr(self, "gradient_checkpointing", False):
                raise StateError(
                    "PreLayer does not go with gradient checkpointing, which runs blocks outside the model's "
                    "forward; turn it off"
                )
            x = _put(x, layout.virtual, part.vectors(x.shape[-1], x).expand(len(x), -1, -1))
        return super().forward(x, *args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class _PrefixConfig(MethodConfig):
    """What the two share: how many positions."""

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

    def _place(self, root: nn.Module) -> Place:
        """The model that gets the positions, if it has room for them."""
        found = _inner(root)
        limit = _limit(found.module)
        if limit is not None and sum(self.lengths) >= limit:
            raise TargetError(
                f"prefix={self.prefix} and infix={self.infix} leave no room for an input: "
                f"{type(root).__name__} has {limit} positions"
            )
        return found

    def _on(self, root: nn.Module, place: Place, part: Inserted) -> Part:
        """The part of the model that gets the positions."""
        if self.infix and place.module is not root and _is_causal(place.module):
            part.__dict__["caller"] = (root,)  # whose calls' labels say where the prompt ends
        return Part(*place[:2], PrefixedModel, part)


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

    def plan(self, root: nn.Module, saved: Collection[str], seed: int) -> Plan:
        """The positions, which start as embeddings of words drawn at random."""
        place = self._place(root)
        random = init.generator(seed, place.path)
        patches = _embeddings_of_patches(place)
        if patches is not None:
            start = torch.empty(sum(self.lengths), hidden_size(root)).normal_(0.0, 0.02, generator=random)
            inner = Part(
                patches.path,
                patches.module,
                PrefixedEmbeddings,
                Inserted(self.lengths, start, patches.module),
            )
            return Plan(parts=[self._on(root, place, Inserted(self.lengths)), inner])
        words = place.module.get_input_embeddings().weight.detach()  # type: ignore[operator]
        drawn = torch.randint(len(words), (sum(self.lengths),), generator=random)
        part = Inserted(self.lengths, words[drawn.to(words.device)], place.module)
        return Plan(parts=[self._on(root, place, part)])


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

    def plan(self, root: nn.Module, saved: Collection[str], seed: int) -> Plan:
        """The positions, and their activations before each block, which start small."""
        place = self._place(root)
        parts = [self._on(root, place, Inserted(self.lengths))]
        patches = _embeddings_of_patches(place)
        if patches is not None:
            parts.append(Part(*patches[:2], PrefixedEmbeddings, Inserted(self.lengths)))
        inside = f"{place.path}." if place.path else ""
        for stack in stacks(root):
            for block in (block for block in stack if block.path.startswith(inside)):
                random = init.generator(seed, block.path)
                start = torch.empty(sum(self.lengths), hidden_size(root)).normal_(0.0, 0.02, generator=random)
                parts.append(Part(*block[:2], PrefixedBlock, Inserted(self.lengths, start, block.module)))
        return Plan(parts=parts)


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


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _layout(mask: Tensor, labels: Tensor | None, lengths: tuple[int, int], *, causal: bool) -> Layout:
    (rows, length), (before, behind), device = mask.shape, lengths, mask.device
    ends = length - mask.flip(1).argmax(1)
    if causal and labels is not None and labels.shape == mask.shape:
        target = labels.to(device) != -100
        ends = torch.where(target.any(1), target.int().argmax(1), ends)
    at = torch.arange(length, device=device).expand(rows, -1)
    tokens = before + at + behind * (at >= ends[:, None])
    first = torch.arange(before, device=device).expand(rows, -1)
    last = before + ends[:, None] + torch.arange(behind, device=device)
    read = torch.where(at == ends[:, None] - 1, tokens + behind, tokens) if causal else tokens
    return Layout(tokens, torch.cat([first, last], dim=1), read)


def _put(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    return x.scatter(1, columns[..., None].expand(-1, -1, x.shape[-1]), values.to(x.dtype))


def _take_out(model: nn.Module, output: Any, layout: Layout) -> None:
    def own(hidden: Tensor) -> Tensor:
        return hidden.gather(1, layout.read[..., None].expand(-1, -1, hidden.shape[-1]))

    output["last_hidden_state"] = own(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(map(own, output["hidden_states"]))
    if output.get("pooler_output") is not None:
        output["pooler_output"] = model.pooler(output["last_hidden_state"])  # type: ignore[operator]


def _is_causal(model: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) for module in model.modules())


def _first_position(model: nn.Module) -> int:
    """RoBERTa and its kin count positions from behind the padding token's."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def _limit(model: nn.Module) -> int | None:
    """Positions that the model has, where it has a limit."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit - _first_position(model) if isinstance(limit, int) else None


def _check_room(model: nn.Module, tokens: int, part: Inserted) -> None:
    limit, taken = _limit(model), sum(part.lengths)
    if limit is not None and tokens + taken > limit:
        raise AdapterError(
            f"the input has {tokens} tokens, and prefix and infix take {taken} of the model's {limit} "
            "positions, "
            f"so {limit - taken} remain; shorten the input"
        )
