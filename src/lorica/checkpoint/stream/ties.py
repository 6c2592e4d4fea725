"""Output embeddings that are tied to the input embeddings and have no tensor of their own in the file."""

from __future__ import annotations

from typing import NamedTuple

from lorica.checkpoint.stream.names import Names
from lorica.checkpoint.stream.shards import Checkpoint

HEAD = "lm_head"
"""Names of decoders' output embedding."""
_TABLES = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "tokens_embed")
"""Names of the table of input embeddings."""
_HEADLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""Tasks whose models have no output embedding."""


class Tie(NamedTuple):
    """An output embedding that is tied.

    Args:
        head: its name in the merged checkpoint, once it has a tensor of its own.
        stored: whether the file already has one, equal to the table.
        table: the input embeddings' name in the file; None if the tied tensors are not known.
    """

    head: str
    stored: bool
    table: str | None


def find_tie(base: Checkpoint, names: Names, task_type: str | None) -> Tie | None:
    """The tie in the model that an adapter belongs to; None if it has none.

    Args:
        base: the checkpoint.
        names: translates the adapter's names to the file's.
        task_type: the adapter's.
    """
    architectures = [name for name in base.config.get("architectures") or [] if isinstance(name, str)]
    bare = any(name.endswith("Model") and "LMHead" not in name for name in architectures)
    stored = names.to_file(f"{HEAD}.weight")
    text = base.config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    says = base.config.get("tie_word_embeddings", inner)
    # Configurations used to leave out what is the architecture's default.
    tied = says if says is not None else bool(architectures) and stored not in base
    if (bare and not names.prefix) or task_type in _HEADLESS or not tied:
        return None
    return Tie(
        stored if stored in base else names.added(f"{HEAD}.weight"),
        stored in base,
        _table(base) if _is_decoder(base, architectures) else None,
    )


def is_table(name: str) -> bool:
    """Whether a tensor is a table of input embeddings, by its name."""
    return name.endswith(tuple(f"{leaf}.weight" for leaf in _TABLES)) or name == "shared.weight"


def _table(base: Checkpoint) -> str | None:
    rows = base.config.get("vocab_size")
    tables = [
        name
        for name in base.home
        if is_table(name) and len(shape := base.entry(name).shape) == 2 and rows in (None, shape[0])
    ]
    return tables[0] if len(tables) == 1 else None


def _is_decoder(base: Checkpoint, architectures: list[str]) -> bool:
    """Whether the head is `lm_head` alone, as in decoders; other heads have more parts."""
    others = ("cls.", "predictions.", f"{HEAD}.dense", f"{HEAD}.layer_norm", f"{HEAD}.decoder")
    return (
        not base.config.get("is_encoder_decoder")
        and not any("MaskedLM" in name or "PreTraining" in name for name in architectures)
        and not any(name.startswith(others) for name in base.home)
    )
