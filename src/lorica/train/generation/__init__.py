"""Text that a model writes: settings, writing in batches, and scores of it in evaluation."""

from __future__ import annotations

from lorica.train.generation.config import GenerationConfig

__all__ = ["GenerationConfig"]
