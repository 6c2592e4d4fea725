"""The reference model of preference training: an adapted model as its adapters were at the start.

    policy     W0, and A, B as they train
    reference  W0, and A, B as they were; the same W0 in memory

TRL's trainers measure rewards against it, so at the first step they are all 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorica.errors import StateError


class Reference(nn.Module):
    """A model with what trains of it as it is now, whatever it trains to.

    It keeps a copy of the trained parameters and puts them on the model for each of its calls. It has no
    parameters of its own to be moved, trained or saved; whatever else is asked of it, the model answers.

    Args:
        model: the model; what trains of it requires a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Not as a part: whatever freezes, moves or prepares the reference must leave the model alone.
        self.__dict__["policy"] = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.__dict__["_trained"] = trained
        self.__dict__["_start"] = [parameter.detach().clone() for parameter in trained]
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not here are the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "policy" not in self.__dict__:  # as copy and pickle ask
                raise
            return getattr(self.policy, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer at the start, in evaluation mode and without gradients."""
        with torch.no_grad(), self._as_it_was():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.policy(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, at the start."""
        with torch.no_grad(), self._as_it_was():
            return self.policy.generate(*args, **kwargs)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        training = [module for module in self.policy.modules() if module.training]
        self._exchange()
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
            self._exchange()

    def _exchange(self) -> None:
        """Let the trained parameters and their copies change values; the parameters stay who they are."""
        # Not copied over: a graph that is waiting for its backward pass holds the values it was made with.
        for i, parameter in enumerate(self._trained):
            start = self._start[i]
            if start.shape != parameter.shape:
                raise StateError(
                    f"a trained parameter was of shape {tuple(start.shape)} when the reference model was "
                    f"made and is of {tuple(parameter.shape)} now; make the trainer once the model is as it "
                    "will train"
                )
            self._start[i] = parameter.data
            parameter.data = start.to(parameter)
