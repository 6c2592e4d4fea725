"""Public data sets by name; see `Preset`. A module here registers those of one kind."""

from __future__ import annotations

from lorica.train.presets import classification as classification
from lorica.train.presets import writing as writing
from lorica.train.presets.base import Preset, apply, get, lay_out, names, register

__all__ = ["Preset", "apply", "get", "lay_out", "names", "register"]
