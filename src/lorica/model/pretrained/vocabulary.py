"""A vocabulary that was resized: what can follow it, and its tables in an adapter's file."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorica.adapter import Adapter
from lorica.errors import LoricaWarning, StateError, listing
from lorica.layers import SwappedModule
from lorica.state import AdapterState
from lorica.tree import base_parameters, input_embedding, join, output_head, walk, whole, within_any


@contextmanager
def resized(model: nn.Module, state: AdapterState, path: str = "") -> Iterator[None]:
    """Around a resizing of the vocabulary: refuses what could not follow it; new tables are base as the old.

    Args:
        model: a model that carries adapters, none merged, or a part of it that is a model too.
        state: the model's.
        path: of the part.

    Raises:
        StateError: an adapter changes one of the tables. The model is untouched.
    """
    tables = {join(path, name): module for name, module in _tables(model)}
    changed = [name for name, module in tables.items() if _is_changed(name, module, state)]
    changed += [join(path, name) for name in _copied(model)]
    if changed:
        raise StateError(
            f"{listing(changed)} cannot be resized while an adapter changes it; resize the model before it "
            "is adapted (lorica.detach takes adapters off)"
        )
    before = base_parameters(model)
    yield
    after = base_parameters(model)
    exchanged = {id(old): after[path] for path, old in before.items() if path in after}
    state.frozen = [exchanged.get(id(parameter), parameter) for parameter in state.frozen]


def resize_part(
    part: Any,
    path: str,
    state: AdapterState,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`resize_token_embeddings` of a model inside the adapted one: as the whole model's.

    Args:
        part: the model inside.
        path: of it.
        state: of the whole.
        new_num_tokens: as transformers has it.
        pad_to_multiple_of: likewise.
        args: likewise.
        kwargs: likewise.

    Raises:
        StateError: an adapter changes one of the tables.
    """
    resize = functools.partial(type(part).resize_token_embeddings, part)
    if new_num_tokens is None and pad_to_multiple_of is None:
        return resize(*args, **kwargs)
    with resized(part, state, path):
        return resize(new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def with_tables(adapter: Adapter, root: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Adapter:
    """The adapter with the model's embedding tables, as PEFT puts them in a file.

    Args:
        adapter: of the model.
        root: the model.
        state_dict: take the values from here instead, by their live names, as far as it has them.
    """
    given = state_dict or {}
    weights = ((f"{path}.weight", module._parameters["weight"]) for path, module in _tables(root))
    own = {name: whole(given.get(name, weight)).detach() for name, weight in weights if weight is not None}
    return dataclasses.replace(adapter, extras={**own, **adapter.extras})


def with_resized_tables(
    adapter: Adapter, root: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> Adapter:
    """As `with_tables` where the vocabulary was resized, for no reader has those rows; else as it is."""
    return with_tables(adapter, root, state_dict) if is_resized(root) else adapter


def is_resized(root: nn.Module) -> bool:
    """Whether the vocabulary is another than that of the base on disk; nothing is fetched to find out."""
    config: Any = getattr(root, "config", None)
    name, read = getattr(config, "_name_or_path", None), getattr(type(config), "from_pretrained", None)
    if not name or read is None or getattr(config, "vocab_size", None) is None:
        return False
    try:
        # Of its own class, which the base's code may have brought: to look that up may ask for trust.
        original = read(name, local_files_only=True)
    except Exception as error:
        # OSError is how transformers says that nothing is there; before it says anything else, it read it.
        if not isinstance(error, OSError) or (Path(name) / "config.json").is_file():
            warnings.warn(
                f"the configuration of the base {name} cannot be read ({error}), so it is not known whether "
                "the vocabulary was resized, and the embeddings are not saved; save_embedding_layers=True of "
                "lorica.peft saves them",
                LoricaWarning,
                stacklevel=4,
            )
        return False
    return getattr(original, "vocab_size", config.vocab_size) != config.vocab_size


def _copied(root: nn.Module) -> list[str]:
    """Live paths of those that are an adapter's own, in a copy of a module around them."""
    own, base = (input_embedding(root), output_head(root)), {module for _, module, _ in walk(root)}
    return [p for p, m in root.named_modules() if m not in base and any(m is table for table in own)]


def _tables(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The input embedding and the output head, by their paths."""
    found = input_embedding(root), output_head(root)
    for path, module, _ in walk(root):
        if any(module is table for table in found) and module._parameters.get("weight") is not None:
            yield path, module


def _is_changed(path: str, module: nn.Module, state: AdapterState) -> bool:
    """Whether some adapter has an update, a copy, rows or a stand-in for a table."""
    whole = [place for name in state.configs for place, rows in state.whole(name).items() if rows is None]
    if isinstance(module, SwappedModule) or within_any(path, whole):
        return True
    own = {name for adapter in state.configs for name in state.stand_ins(adapter)}
    return any(f"{path}.{leaf}" in own for leaf in module._parameters)
