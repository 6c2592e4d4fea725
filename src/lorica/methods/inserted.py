"""The modules that run with virtual positions: the model around them, its embeddings, its blocks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorica.errors import StateError
from lorica.layers.plugins.added import AddedModule, like
from lorica.methods.positions import Layout, check_room, first_position, is_causal, lay_out, put
from lorica.state import AdapterState, find_adapted

_NOTE = "lorica_inserted"


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

    def __init__(self, state: AdapterState) -> None:
        self.adapter_state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note them; where the call brings none, those of `noted_labels` stand."""
        if "labels" in kwargs:
            self.adapter_state.labels = kwargs["labels"]


@contextmanager
def noted_labels(model: nn.Module, labels: Tensor | None) -> Iterator[None]:
    """Within it, a call that brings no labels has these say where its prompts end.

    A trainer that computes the loss itself, for smoothed labels say, keeps the labels from the model.
    """
    found = find_adapted(model)
    if found is None:
        yield
        return
    found[1].labels = labels
    try:
        yield
    finally:
        found[1].labels = None


class PrefixedModel(AddedModule):
    """The model inside a task's: the virtual positions are put in before it runs, and taken out after."""

    own_modules = ("inserted",)
    own_attributes = ("adapter_state", "noting")

    def prepare(self) -> None:
        """As `AddedModule.prepare`; nothing is noted yet."""
        super().prepare()
        self.__dict__["noting"] = None

    def add_part(self, name: str, part: nn.Module) -> None:
        """Take an adapter's part; with an infix, have the labels of each call noted."""
        super().add_part(name, part)
        caller = part.__dict__.pop("caller", None)
        if caller is not None and self.__dict__["noting"] is None:
            note = NoteLabels(self.adapter_state)
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
        """The model's outputs for the input's own positions."""
        part = self.acting_part(Inserted)
        if part is None:
            return super().forward(*args, **kwargs)
        call = _by_name(self, args, kwargs)
        as_tuple = call.pop("return_dict", None) is False
        labels, self.adapter_state.labels = self.adapter_state.labels, None
        cache = call.get("past_key_values")
        cached = cache.get_seq_length() if cache is not None else 0
        if cached:
            self._continue(part, call, cached)
            output = super().forward(**call, return_dict=True)
        else:
            mask = None
            if call.get("pixel_values") is None:  # else the embeddings insert, which know the patches
                self.adapter_state.layout, mask = self._insert(part, call, labels)
            try:
                output = super().forward(**call, return_dict=True)
                _take_out(self, output, self.adapter_state.layout)
            finally:
                self.adapter_state.layout = None
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
        check_room(self, x.shape[1], part.lengths)
        told = labels is not None or self.__dict__["noting"] is None  # else there is no head to read words by
        if part.lengths[1] and not told and self.training and torch.is_grad_enabled():
            raise StateError(
                "an infix stands where the prompt ends, and in training the labels say where: this call has "
                "none; pass labels, or call model.eval() if this is no training"
            )
        positions = call.get("position_ids")
        if given is None and positions is not None and bool((positions.diff(dim=-1) <= 0).any()):
            raise StateError(
                "position_ids start again inside a row: rows are packed, and a prefix can stand only before "
                "the first of them; turn packing off"
            )
        layout = lay_out(mask, labels, part.lengths, causal=is_causal(self))
        rows, columns = mask.shape[0], mask.shape[1] + sum(part.lengths)
        vectors = part.vectors(x.shape[-1], x).expand(rows, -1, -1)
        call["inputs_embeds"] = put(
            put(x.new_zeros(rows, columns, x.shape[-1]), layout.tokens, x), layout.virtual, vectors
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
        """Make a call that continues from a cache count the virtual positions in it."""
        mask = getattr(call["past_key_values"], _NOTE, None)
        if mask is None:
            raise StateError(
                "the key-value cache was filled without the prefix; start again with the adapter acting"
            )
        x = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        new = cached + x.shape[1] - mask.shape[1]
        check_room(self, cached + x.shape[1] - sum(part.lengths), part.lengths)
        given = call.get("attention_mask")
        tail = mask.new_ones(mask.shape[0], new) if given is None else given[:, -new:].to(mask)
        call["attention_mask"] = full = torch.cat([mask, tail], dim=1)
        self._number(call, full, x.shape[1])

    def _number(self, call: dict[str, Any], mask: Tensor, last: int) -> None:
        """Give the last columns their positions, counted over the attended ones."""
        if "position_ids" in inspect.signature(type(self).forward).parameters:
            counted = (mask.cumsum(1) - 1).clamp(min=0)
            call["position_ids"] = counted[:, -last:] + first_position(self)


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
        self.adapter_state.layout = lay_out(mask, None, part.lengths, causal=False)
        before, behind = part.vectors(x.shape[-1], x).expand(len(x), -1, -1).split(part.lengths, dim=1)
        return torch.cat([before, x, behind], dim=1)


class PrefixedBlock(AddedModule):
    """A block before which the activations at the virtual positions are replaced by trained ones."""

    own_modules = ("inserted",)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's outputs for them."""
        part, layout = self.acting_part(Inserted), self.adapter_state.layout
        if part is not None and layout is not None:
            if self.training and getattr(self, "gradient_checkpointing", False):
                raise StateError(
                    "PreLayer does not go with gradient checkpointing, which runs blocks outside the model's "
                    "forward; turn it off"
                )
            x = put(x, layout.virtual, part.vectors(x.shape[-1], x).expand(len(x), -1, -1))
        return super().forward(x, *args, **kwargs)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _take_out(model: nn.Module, output: Any, layout: Layout) -> None:
    def own(hidden: Tensor) -> Tensor:
        return hidden.gather(1, layout.read[..., None].expand(-1, -1, hidden.shape[-1]))

    output["last_hidden_state"] = own(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(map(own, output["hidden_states"]))
    if output.get("pooler_output") is not None:
        output["pooler_output"] = model.pooler(output["last_hidden_state"])  # type: ignore[operator]
