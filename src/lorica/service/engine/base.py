"""The one frozen base: its head, its linear layers, its limits, and how a sequence is read by it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.errors import listing
from lorica.layers.quantized import quantizer_of
from lorica.service.engine.abreast import Abreast
from lorica.service.engine.lanes import HEAD, Joint, Lane, Part, together
from lorica.service.engine.targets import Targets, is_linear
from lorica.service.engine.weights import Weights, numbered
from lorica.service.errors import UserError
from lorica.state import find_adapted
from lorica.train.trainer.deferred import DeferredLogits, deferred_logits
from lorica.train.trainer.loss import output_head


class Read(NamedTuple):
    """The model's outputs for sequences of one length, before its head.

    Args:
        hidden: (sequences, tokens, width), what the head reads; or (sequences, tokens, vocabulary), the
            logits themselves, of a model that makes them in another way.
        after: operation on logits before they are used, such as softcapping.
        compute: the head's own forward, where it is more than a product.
        cache: keys and values for the next tokens; None where the model keeps none.
    """

    hidden: Tensor
    after: Callable[[Tensor], Tensor]
    compute: Callable[[Tensor], Tensor] | None
    cache: Any = None


class Base:
    """A causal model that nothing changes any more.

    Args:
        model: it is put in evaluation, and its parameters are frozen.
        name: under which clients ask for it.
        tokenizer: for texts that end a sample; None where only tokens do.

    Raises:
        UserError: it is no causal language model of transformers, it carries adapters, or it is quantized.
    """

    def __init__(self, model: nn.Module, name: str, tokenizer: Any = None) -> None:
        """Look at it once, with one token."""
        if find_adapted(model) is not None:
            raise UserError("the model carries adapters; a service wants the base (lorica.detach it first)")
        packed = [path for path, module in model.named_modules() if quantizer_of(module) is not None]
        if packed:
            raise UserError(
                f"the base is quantized ({listing(packed, limit=2)}), and a service multiplies by plain "
                "weights; load it without quantizing"
            )
        self.model, self.name, self.tokenizer = model.eval().requires_grad_(False), name, tokenizer
        config: Any = getattr(model, "config", None)
        table = getattr(model, "get_input_embeddings", lambda: None)()
        if config is None or table is None:
            raise UserError(f"{type(model).__name__} is no language model of transformers")
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = int(table.weight.shape[0])
        self.context = int(getattr(text, "max_position_embeddings", None) or 1 << 20)
        self.device = table.weight.device
        self.head = output_head(model)
        self.joint = Joint(model, self.head)
        self._head = numbered(model).get(self.head, -1)  # type: ignore[arg-type]
        self.abreast = Abreast.of(model, self.head, self.context)
        with self.running(backward=False):
            seen = self.read(torch.zeros(1, 1, dtype=torch.long))
        if seen.hidden.shape[-1] == self.vocabulary and seen.compute is None and not self._is_deferred:
            self.head, self.joint = None, Joint(model, None)
        self.targets = Targets.of(model, output_head(model))
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = getattr(text, "eos_token_id", None) if ends is None else ends
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or ())

    @property
    def tokenizer_id(self) -> str:
        """Hub name or folder of its tokenizer, for clients; the base's own name where it has none."""
        place = getattr(self.tokenizer, "name_or_path", "") or self.name
        return str(Path(place).resolve()) if Path(place).is_dir() else place

    @classmethod
    def sharing(cls, model: nn.Module, name: str, tokenizer: Any = None) -> Base:
        """As `Base`, on a copy of the model's modules around its parameters: others may use the model too."""
        return cls(copy.deepcopy(model, {id(p): p for p in model.parameters()}), name, tokenizer)

    @contextmanager
    def running(self, *, backward: bool) -> Iterator[None]:
        """Within it, lanes can run the model."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(backward))
            stack.enter_context(self.joint.joined())
            if self.head is not None:
                stack.enter_context(deferred_logits(self.head))
            yield

    def read(self, tokens: Tensor, cache: Any = None, *, keep: bool = False) -> Read:
        """Run the model on sequences, or on more of them.

        Args:
            tokens: (sequences, N).
            cache: of the tokens before; None at the start.
            keep: whether a cache is wanted.
        """
        more = {} if cache is None else {"past_key_values": cache}
        out = self.model(input_ids=tokens.to(self.device), use_cache=keep, **more)
        cache = getattr(out, "past_key_values", None) if keep else None
        logits = out.logits
        self._is_deferred = isinstance(logits, DeferredLogits)
        if not isinstance(logits, DeferredLogits):
            return Read(logits, lambda rows: rows, None, cache)
        compute = None if is_linear(self.head) else logits.head.compute
        return Read(logits.hidden, logits.after, compute, cache)

    def logits(
        self, reads: Sequence[Read], xs: Sequence[Tensor], weights: Sequence[Weights | None]
    ) -> list[Tensor]:
        """The logits of some rows (rows, width) of each sequence, in float32 or better."""
        if self.head is None:
            ys: Sequence[Tensor] = xs
        elif reads[0].compute is not None:
            ys = [read.compute(x) for read, x in zip(reads, xs, strict=True)]  # type: ignore[misc]
        else:
            updates = [None if own is None else own.of(self._head) for own in weights]
            parts = [Part.of(x, update, i) for i, (x, update) in enumerate(zip(xs, updates, strict=True))]
            ys = together(self.head, parts)
        return [precise(read.after(y)) for read, y in zip(reads, ys, strict=True)]

    def lane_logits(self, lane: Lane, read: Read, rows: Tensor) -> Tensor:
        """As `logits`, of rows (sequences, …, width) of a lane; call it from inside the lane."""
        if self.head is None or read.compute is not None:
            return precise(read.after(rows if read.compute is None else read.compute(rows)))
        return precise(read.after(lane.linear(HEAD + self._head, self.head, rows)))


def precise(logits: Tensor) -> Tensor:
    """In float32, or in the higher precision that they have."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
