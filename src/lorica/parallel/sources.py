"""Sources of a base's values: files that every rank reads, or one rank that sends them.

folder of safetensors   each rank reads its own parts, out of memory-mapped files
state of rank 0         one tensor after another is sent to all, and each keeps its part
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from lorica.checkpoint.stream.names import Names, match
from lorica.checkpoint.stream.shards import Checkpoint, open_checkpoint
from lorica.errors import ConfigError


class Source(ABC):
    """The tensors of a base by the model's names.

    Attributes:
        shapes: name in the source → shape.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def place(self, name: str) -> str | None:
        """The name that a tensor of the model has here; None where it is not here."""
        return name if name in self.shapes else None

    @abstractmethod
    def read(self, name: str, like: Tensor) -> Tensor:
        """A whole tensor, or one whose bytes are read as they are used; every rank asks for the same.

        Args:
            name: in the source.
            like: what it is for.
        """


class Files(Source):
    """A folder of safetensors.

    Args:
        folder: with the files.
        modules: paths of the model's modules that hold a weight, by which its names are fitted to the files'.

    Raises:
        FileError: the folder holds no safetensors, or damaged ones.
    """

    def __init__(self, folder: str | Path, modules: Collection[str]) -> None:
        self.base: Checkpoint = open_checkpoint(folder)
        self.shapes = {name: self.base.entry(name).shape for name in self.base.home}
        self.names: Names = match(list(modules), self.shapes)
        self._open: dict[str, Any] = {}

    def place(self, name: str) -> str | None:  # noqa: D102
        return next((n for n in (name, self.names.to_file(name)) if n in self.shapes), None)

    def read(self, name: str, like: Tensor) -> Tensor:  # noqa: D102
        from safetensors import safe_open

        file = self.base.home[name]
        if file not in self._open:
            self._open[file] = safe_open(self.base.folder / file, framework="pt")
        return self._open[file].get_tensor(name)


class FromRankZero(Source):
    """A state that rank 0 has.

    Args:
        state: name → tensor, on rank 0; the others' is not looked at.
        device: over which it is sent.
    """

    def __init__(self, state: Mapping[str, Tensor] | None, device: torch.device) -> None:
        self.several = distributed.is_initialized() and distributed.get_world_size() > 1
        self.first = not self.several or distributed.get_rank() == 0
        shapes = {name: tuple(tensor.shape) for name, tensor in (state or {}).items()} if self.first else {}
        box: list[Any] = [shapes]
        if self.several:
            distributed.broadcast_object_list(box, device=device)
        self.shapes, self.state, self.device = box[0], state, device
        if not self.shapes:
            raise ConfigError(
                "rank 0 gave no state of the base; give its state_dict() there, and None on the other ranks"
            )

    def read(self, name: str, like: Tensor) -> Tensor:  # noqa: D102
        if not self.first:
            value = torch.empty(self.shapes[name], dtype=like.dtype, device=self.device)
        else:
            assert self.state is not None
            value = self.state[name].detach().to(self.device, like.dtype).contiguous()
        if self.several:
            distributed.broadcast(value, src=0)
        return value
