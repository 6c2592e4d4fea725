"""Steps that few merges need.

packed   quantized weights: packed again, or plain layers that replace them
ties     tied parameters whose merged values differ
delta    what merging would add to one weight
"""

from __future__ import annotations

from lorica.model.merging.plugins import packed as packed
from lorica.model.merging.plugins import ties as ties
