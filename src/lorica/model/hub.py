"""Uploading an adapter to the Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.errors import ConfigError
from lorica.model.files import extract
from lorica.model.pretrained.vocabulary import with_resized_tables
from lorica.state import adapted


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
    """Upload an adapter to the Hub in one commit; creates the repository if necessary.

    Args:
        source: adapted model, adapter as a value, or folder with an adapter; nothing else is uploaded.
        repo_id: name of the repository, ``"user/sentiment"``.
        name: the name of the model's adapter; None takes the only one, or the only active one.
        subfolder: path of the adapter inside the repository; None for the top.
        revision: branch; created if it does not exist. None is the main branch.
        private: whether a new repository is private; None takes the account's default.
        token: the account's token; None takes that of ``HF_TOKEN`` or ``hf auth login``.
        commit_message: title of the commit.
        create_pr: open a pull request instead of committing to the branch.

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
