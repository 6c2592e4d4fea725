"""Recipes trained by Ray Train.

trainer    Ray's own trainer, with a recipe in place of a function      command    the same for `lorica train`
"""

from __future__ import annotations

from lorica.train.ray.command import train_on_ray as train_on_ray
from lorica.train.ray.trainer import TorchTrainer as TorchTrainer
