"""The model without its head: loaded once, with all that the adapters on it share."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from lorica.checkpoint.embedded import resolve_model
from lorica.errors import ConfigError
from lorica.serve.encoder.heads import Head, Kind, auto_class, make_head
from lorica.train.console import quiet
from lorica.train.tasks.base import loading, positions_of

Pooling = Literal["mean", "cls", "last"]


@dataclass(eq=False)
class Base:
    """A model that reads.

    Args:
        name: folder or Hub name.
        model: the trunk, frozen, in evaluation mode.
        config: its configuration.
        tokenizer: its tokenizer.
        prefix: prefix of the trunk's paths in a model with a head.
        pooling: how a text's vector is made of its tokens'.
        normalized: whether vectors have length 1.
        own: the base's own head; None where it has none.
    """

    name: str
    model: nn.Module
    config: Any
    tokenizer: Any
    prefix: str
    pooling: Pooling
    normalized: bool
    own: Head | None = None
    _values: dict[Kind, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    _reading: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def context(self) -> int:
        """Tokens that it takes."""
        return int(min(positions_of(self.config) or 1 << 20, self.tokenizer.model_max_length, 1 << 20))

    def values(self, kind: Kind) -> Mapping[str, Tensor]:
        """The head's parameters in the base's files; read once for each kind."""
        with self._reading:
            if kind not in self._values:
                self._values[kind] = _head_values(self.name, auto_class(kind), self.prefix)
            return self._values[kind]

    @classmethod
    def open(cls, name: str, tokenizer: str | None = None) -> Base:
        """Load a model.

        Args:
            name: folder or Hub name.
            tokenizer: where else its tokenizer is; None: beside it.

        Raises:
            FileError: it cannot be loaded.
            ConfigError: it reads and writes (T5), or has no token to pad with.
        """
        here = resolve_model(name)
        with quiet(), loading(f"a model from {name!r}"):
            config = transformers.AutoConfig.from_pretrained(here, trust_remote_code=False)
            if config.is_encoder_decoder:
                raise ConfigError(
                    f"{name} ({config.model_type}) reads and writes; lorica serve takes models that do either"
                )
            words = transformers.AutoTokenizer.from_pretrained(tokenizer or here, trust_remote_code=False)
            model: Any = transformers.AutoModel.from_pretrained(here, trust_remote_code=False)
        if words.pad_token_id is None:
            if words.eos_token is None:
                raise ConfigError(
                    f"the tokenizer of {name} has no token to pad with; set its pad_token and save it"
                )
            words.pad_token = words.eos_token
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = model.config.pad_token_id = words.pad_token_id
        pooling, normalized = _pooling(Path(here))
        base = cls(name, model.eval().requires_grad_(False), config, words, "", pooling, normalized)
        with torch.device("meta"):
            with_head: Any = auto_class("classes").from_config(config)
        base.prefix = with_head.base_model_prefix
        if kind := _own_kind(config):
            names: Any = config.id2label
            labels = [str(names[i]) for i in sorted(names)]
            raw = config.problem_type == "regression"
            base.own = make_head(config, kind, labels, base.values(kind), raw=raw)
        return base


def _own_kind(config: Any) -> Kind | None:
    """The kind of a checkpoint's head, where it has one of ours."""
    named = next(iter(config.architectures or []), "")
    if named.endswith("ForTokenClassification"):
        return "tags"
    if not named.endswith("ForSequenceClassification"):
        return None
    if config.problem_type == "multi_label_classification":
        return "labels"
    return "number" if config.num_labels == 1 else "classes"


def _head_values(name: str, model_class: Any, prefix: str) -> Mapping[str, Tensor]:
    """Parameters of a head that a model's files have; those that would be drawn at random are left out."""
    with quiet(), loading(f"a head from {name!r}"):
        model, report = model_class.from_pretrained(
            resolve_model(name),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    drawn = {
        key if isinstance(key, str) else key[0]
        for key in (*report["missing_keys"], *report["mismatched_keys"])
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        key: tensor.detach().clone()
        for key, tensor in tensors.items()
        if key not in drawn and not key.startswith(f"{prefix}.")
    }


def _pooling(folder: Path) -> tuple[Pooling, bool]:
    """The pooling by sentence-transformers' files; else by the mean, and of length 1."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
        said = json.loads((folder / paths["Pooling"] / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        return "mean", True
    if said.get("pooling_mode_cls_token"):
        return "cls", "Normalize" in paths
    return ("last" if said.get("pooling_mode_lasttoken") else "mean"), "Normalize" in paths
