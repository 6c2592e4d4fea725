"""Adapters of a model to disk and the Hub, and back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TypeVar

from torch import nn

from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.errors import ConfigError
from lorica.model.attach import attach_finite
from lorica.model.structure import adapted
from lorica.model.values import as_trained as live
from lorica.model.values import extract, overwrite
from lorica.model.vocabulary import with_resized_tables

M = TypeVar("M", bound=nn.Module)


def save(
    model: nn.Module, directory: str | Path, name: str | None = None, *, as_trained: bool = False
) -> Path:
    """Write an adapter to a folder in PEFT's format.

    The files are `adapter_config.json`, `adapter_model.safetensors` and `README.md`. Nothing touches the
    network. A folder that is written over holds either the old adapter or the new one, or refuses to load.

    What is written is an update of the base as it was before `adapt`, whatever `init_lora_weights` took out
    of it: the start is added with the other sign, for twice the rank, and any reader of PEFT's files computes
    the same. lorica takes the two apart again to train on.

    Where the vocabulary of a transformers model was resized since the base was saved, the file holds the
    embedding tables too: no reader has their new rows. `load` puts them on a model of that size.

    Args:
        model: adapted model.
        directory: folder; made if it is not there.
        name: of the adapter; None takes the only one, or the only active one.
        as_trained: write A and B as they train, with `init_lora_weights` as it was given; half the size, and
            as PEFT does it unasked. A reader must then make the same start from the same base, which PEFT
            does for ``"pissa"`` and ``"olora"``, and cannot for the others.

    Returns:
        The folder.

    Raises:
        AdapterError: no such adapter, more than one to choose from, or NaN or infinity in its tensors.
        FileError: the folder cannot be written.
        StateError: an adapter is merged, or none was ever put on.
    """
    adapter = live(model, name) if as_trained else extract(model, name)
    return checkpoint.write(with_resized_tables(adapter, adapted(model)[0]), directory)


def push_to_hub(
    source: nn.Module | Adapter | str | Path,
    repo_id: str,
    name: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload an adapter to the Hub, in one commit; the repository is made if need be.

    Args:
        source: adapted model, adapter as a value, or folder with an adapter, of which nothing else goes.
        repo_id: name of the repository, ``"user/sentiment"``.
        name: of the model's adapter; None takes the only one, or the only active one.
        subfolder: where in the repository the adapter goes; None for the top.
        revision: branch; made if it is not there. None is the main one.
        private: whether the repository is; None takes the account's default for a new one.
        token: of the account; None takes the one of ``HF_TOKEN`` or ``hf auth login``.
        commit_message: title of the commit.
        create_pr: open a pull request in place of committing to the branch.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        AdapterError: no such adapter, more than one to choose from, or NaN or infinity in its tensors.
        StateError: an adapter is merged, or none was ever put on.
        FileError: the adapter is damaged, or the Hub cannot be reached or refuses.
        ConfigError: the repository is there already, and public where private was asked, or the reverse.
        MissingExtra: huggingface_hub is not installed.
    """
    with tempfile.TemporaryDirectory() as stage:
        if isinstance(source, nn.Module):
            source = with_resized_tables(extract(source, name), adapted(source)[0])
        elif name is not None:
            raise ConfigError(
                f"name={name!r} chooses among a model's adapters; {type(source).__name__} has one"
            )
        return checkpoint.push(
            checkpoint.write(source, stage) if isinstance(source, Adapter) else source,
            repo_id,
            subfolder=subfolder,
            revision=revision,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def load(
    model: M,
    directory: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> M:
    """Put an adapter from a folder or the Hub on a model, in place; PEFT's files or lorica's.

    The first adapter on a model acts at once; a later one waits for `active`.

    Args:
        model: the base, or a model that carries other adapters.
        directory: folder with `adapter_config.json` and `adapter_model.safetensors`; or the name of a
            repository on the Hub, ``"user/sentiment"``, if there is no such folder.
        name: to give it on this model.
        trainable: whether it may be trained further.
        revision: branch, tag or commit of the repository.
        subfolder: where in the folder or repository the adapter is.
        token: for a private or gated repository; None takes the one of ``HF_TOKEN`` or ``hf auth login``.

    Returns:
        The same model.

    Raises:
        FileError: a file is missing or damaged; or the Hub has no such adapter, or cannot be reached.
        ConfigError: the configuration asks for what lorica does not support.
        AdapterError: with the whole list of what is missing, unexpected or of another shape; the model is
            untouched.
        MissingExtra: a repository is named, and huggingface_hub is not installed.
    """
    adapter = checkpoint.read(directory, revision=revision, subfolder=subfolder, token=token)
    return attach_finite(model, adapter, name, trainable=trainable)


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
