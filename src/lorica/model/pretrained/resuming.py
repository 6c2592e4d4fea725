"""Taking a trainer's checkpoint back up: each adapter that trains gets its own values, the others are left.

A checkpoint is what `save_pretrained` wrote of all adapters::

    checkpoint-40/            the only adapter, or the one named "default"
    checkpoint-40/topics/     any other
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lorica import checkpoint
from lorica.checkpoint.peft import read as read_folder
from lorica.errors import FileError, listing
from lorica.model.files import fitting
from lorica.state import find_adapted


def holds_adapters(folder: str | Path) -> bool:
    """Whether a checkpoint holds an adapter, at its top or in a folder of its own."""
    folder = Path(folder)
    return checkpoint.is_adapter(folder) or bool(beside(folder))


def restore_trained(model: nn.Module, folder: str | Path) -> bool:
    """Give the adapters that train the values that a checkpoint has of them.

    Which adapters act, what trains and the training mode stay as they are, and so does every adapter that is
    frozen.

    Args:
        model: adapted model, or what wraps it.
        folder: the checkpoint.

    Returns:
        Whether that was done: the model carries adapters, and the folder holds some.

    Raises:
        FileError: the checkpoint lacks an adapter that trains, or a file is damaged; the model is untouched.
        AdapterError: an adapter is of another make there; the model is untouched.
    """
    found, folder = find_adapted(model), Path(folder)
    if found is None or not holds_adapters(folder):
        return False
    root, state = found
    trained = state.in_training()
    homes = {name: _home(folder, name, alone=len(trained) == 1) for name in trained}
    writers = [fitting(root, read_folder(home), name) for name, home in homes.items()]
    for write in writers:
        write()
    return True


def _home(folder: Path, name: str, *, alone: bool) -> Path:
    """The folder of an adapter in a checkpoint."""
    own = folder / name
    if checkpoint.is_adapter(own):
        return own
    others = beside(folder)
    # Where nothing stands beside it, the adapter at the top was the only one when the checkpoint was written.
    if checkpoint.is_adapter(folder) and (name == "default" or (alone and not others)):
        return folder
    have = [*(["'default'"] if checkpoint.is_adapter(folder) else []), *map(repr, others)]
    raise FileError(
        f"{folder} holds no adapter named {name!r}, which trains here; it holds: {listing(have)}. Give the "
        "adapters the names that they had in that run"
    )


def beside(folder: Path) -> list[str]:
    """The adapters that have folders of their own in a checkpoint."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and checkpoint.is_adapter(path))
