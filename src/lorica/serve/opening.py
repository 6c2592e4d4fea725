"""From a name to an engine: a run, an adapter's folder, a merged run, or any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from lorica.checkpoint import is_adapter
from lorica.checkpoint.embedded import resolve_model
from lorica.checkpoint.peft import read_settings
from lorica.errors import ConfigError, FileError
from lorica.serve.decoder import Decoder
from lorica.serve.encoder import Base, EncoderEngine
from lorica.serve.store import folders
from lorica.train.console import quiet
from lorica.train.recipe import check_file
from lorica.train.run import RECIPE
from lorica.train.tasks.base import loading

Kind = Literal["decoder", "encoder"]
"""Whether a model writes text or reads it."""

_WRITES = ("ForCausalLM", "LMHeadModel")
_TASKS: Mapping[str, Kind | None] = {
    "CAUSAL_LM": "decoder",
    "SEQ_CLS": "encoder",
    "TOKEN_CLS": "encoder",
    "FEATURE_EXTRACTION": "encoder",
    "causal-lm": "decoder",
    "sequence-classification": "encoder",
    "multi-label-classification": "encoder",
    "regression": "encoder",
    "token-classification": "encoder",
}
"""Tasks of PEFT's and of recipes that can be served."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A name that was looked at.

    Args:
        base: the base, a folder or Hub name.
        kind: whether it writes text or reads it.
        adapter: the folder of an adapter that was named; None: a model was.
        tokenizer: folder or Hub name of the tokenizer.
    """

    base: str
    kind: Kind
    adapter: Path | None = None
    tokenizer: str

    @property
    def model(self) -> str:
        """Name of the base."""
        here = Path(self.base)
        return here.resolve().name if here.is_dir() else self.base

    @property
    def default(self) -> str | None:
        """Name of the adapter."""
        return None if self.adapter is None else next(iter(folders.scan([self.adapter])), None)


def look_at(source: str) -> Source:
    """Find out the kind of a name; nothing is loaded.

    Args:
        source: folder that `lorica train`, `lorica demo` or `lorica merge` wrote; folder of an adapter; or a
            model, by folder or Hub name.

    Raises:
        FileError: there is no such thing, or an adapter does not say which base it is for.
        ConfigError: its task is none that is served.
    """
    given = Path(source)
    inner = given / "adapter"
    folder = inner if not is_adapter(given) and given.is_dir() and is_adapter(inner) else given
    recipe: Mapping[str, Any] = check_file(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    if not is_adapter(folder):
        if given.is_dir() and not (given / "config.json").is_file():
            raise FileError(f"{given} holds neither a model nor an adapter")
        return Source(base=source, kind=_kind(recipe.get("task"), source), tokenizer=source)
    settings = read_settings(folder)
    base = recipe.get("model") or settings.get("base_model_name_or_path")
    if not base:
        raise FileError(
            f"the adapter {folder} does not say which base it is for; serve the base, with --adapters"
        )
    base = str(base)
    own = (folder / "tokenizer_config.json").is_file()
    task = recipe.get("task") or settings.get("task_type")
    return Source(base=base, kind=_kind(task, base), adapter=folder, tokenizer=str(folder) if own else base)


def _kind(task: Any, base: str) -> Kind:
    """Whether a model writes or reads, by the task of its run, or else by its configuration."""
    if task is not None:
        kind = _TASKS.get(str(task))
        if kind is None:
            served = ", ".join(name for name in _TASKS if name.islower())
            raise ConfigError(f"the task {task} is not served; these are: {served}")
        return kind
    with quiet(), loading(f"a model from {base!r}"):
        config = transformers.AutoConfig.from_pretrained(resolve_model(base), trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ConfigError(f"{base} ({config.model_type}) reads and writes; models that do either are served")
    named = next(iter(config.architectures or []), "")
    return "decoder" if named.endswith(_WRITES) else "encoder"


def open_engine(
    source: Source,
    adapters: Sequence[str | Path] = (),
    *,
    slots: int = 32,
    max_rank: int = 64,
    dtype: str = "auto",
    context: int | None = None,
    wait: float | None = None,
) -> Decoder | EncoderEngine:
    """Load the base, and make the engine that serves it; it is not started yet.

    Args:
        source: as `look_at` found it.
        adapters: folders that hold adapters' folders, beside the source's own adapter.
        slots: adapters in a batch together (of a model that reads: on it).
        max_rank: larger ranks are refused.
        dtype: of the weights of a model that writes: ``"auto"`` is that of its files.
        context: tokens of prompt and answer together; None for the model's, as far as memory allows.
        wait: seconds after which a request that is in no batch yet is refused; None for never.

    Raises:
        LoricaError: the model cannot be loaded or served, or a folder is not there.
    """
    roots = [*([] if source.adapter is None else [source.adapter]), *map(Path, adapters)]
    if missing := [root for root in roots if not root.is_dir()]:
        raise FileError(f"there is no folder {missing[0]}")
    if source.kind == "encoder":
        base = Base.open(source.base, source.tokenizer)
        return EncoderEngine(base, roots, slots=slots, max_rank=max_rank, wait=wait)
    with quiet(), loading(f"a model from {source.base!r}"):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            resolve_model(source.base), dtype=dtype, trust_remote_code=False
        )
        words = transformers.AutoTokenizer.from_pretrained(
            resolve_model(source.tokenizer), trust_remote_code=False
        )
    if torch.cuda.is_available():
        model = model.to("cuda")
    options = {"slots": slots, "max_rank": max_rank, "context": context, "wait": wait}
    return Decoder(model.eval(), words, adapters=roots, **options)  # type: ignore[arg-type]
