"""An adapter in training, as files: PEFT's own, and beside them the optimizer's state.

adapter_config.json  adapter_model.safetensors  README.md      as `lorica.save` writes them
optimizer.safetensors                                          AdamW's averages and its count
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor

from lorica import checkpoint
from lorica.adapter import Adapter
from lorica.checkpoint.atomic import replace_file
from lorica.errors import FileError
from lorica.service.engine.weights import Learner, Weights

OPTIMIZER = "optimizer.safetensors"


def write(weights: Weights, folder: Path, *, optimizer: bool) -> Path:
    """Write an adapter to a folder, which appears once it is whole.

    Args:
        weights: the adapter.
        folder: created if missing.
        optimizer: whether with the optimizer's state, for `Learner.take`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if optimizer:
        assert isinstance(weights, Learner)
        tensors = {name: tensor.cpu() for name, tensor in weights.moments().items()}
        replace_file(folder / OPTIMIZER, lambda path: safetensors.torch.save_file(tensors, path))
    return checkpoint.write(weights.adapter(), folder)


def read(folder: Path, *, optimizer: bool) -> tuple[Adapter, dict[str, Tensor] | None]:
    """Read a folder of `write`.

    Raises:
        FileError: it is not there, or damaged, or the optimizer's part is asked for and was not written.
    """
    adapter = checkpoint.read(folder)
    if not optimizer:
        return adapter, None
    path = folder / OPTIMIZER
    if not path.is_file():
        raise FileError(f"{folder.name} was saved without its optimizer; load the weights alone")
    return adapter, safetensors.torch.load_file(path)
