"""Adapters of a model to disk and back."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from lorica import checkpoint
from lorica.model.attach import attach_finite
from lorica.model.values import extract, overwrite

M = TypeVar("M", bound=nn.Module)


def save(model: nn.Module, directory: str | Path, name: str | None = None) -> Path:
    """Write an adapter to a folder in PEFT's format.

    The files are `adapter_config.json`, `adapter_model.safetensors` and `README.md`. Nothing touches the
    network. A folder that is written over holds either the old adapter or the new one, or refuses to load.

    Args:
        model: adapted model.
        directory: folder; made if it is not there.
        name: of the adapter; None takes the only one, or the only active one.

    Returns:
        The folder.

    Raises:
        AdapterError: no such adapter, more than one to choose from, or NaN or infinity in its tensors.
        FileError: the folder cannot be written.
        StateError: an adapter is merged, or none was ever put on.
    """
    return checkpoint.write(extract(model, name), directory)


def load(model: M, directory: str | Path, name: str = "default", *, trainable: bool = False) -> M:
    """Put an adapter from a folder on a model, in place; PEFT's files or lorica's.

    The first adapter on a model acts at once; a later one waits for `active`.

    Args:
        model: the base, or a model that carries other adapters.
        directory: folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: to give it on this model.
        trainable: whether it may be trained further.

    Returns:
        The same model.

    Raises:
        FileError: a file is missing or damaged.
        ConfigError: the configuration asks for what lorica does not support.
        AdapterError: with the whole list of what is missing, unexpected or of another shape; the model is
            untouched.
    """
    return attach_finite(model, checkpoint.read(directory), name, trainable=trainable)


def load_weights(model: nn.Module, directory: str | Path, name: str | None = None) -> None:
    """Give an adapter that is already on the model the values saved in a folder, as resuming does.

    Args:
        model: adapted model.
        directory: folder that `save` wrote for an adapter of the same make.
        name: of the adapter; None takes the only one, or the only active one.

    Raises:
        FileError: a file is missing or damaged.
        AdapterError: with the whole list of what does not fit; the model is untouched.
    """
    overwrite(model, checkpoint.read(directory), name)
