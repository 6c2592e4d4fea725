"""What few merges concern: packed weights, and tied ones whose merged values differ."""

from __future__ import annotations

from lorica.model.merging.plugins import packed as packed
from lorica.model.merging.plugins import ties as ties
