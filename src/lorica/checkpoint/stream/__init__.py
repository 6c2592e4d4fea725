"""Merging an adapter into a checkpoint on disk, a few rows at a time, without making the model.

names      which tensor of the file a module is          ties       output embeddings that share the input's
placement  which rows get which update                   plan       the merged checkpoint, before it is written
shards     safetensors as ranges of bytes                blocks     a tensor's values, a block at a time
staging    a folder that can be gone on with             rounding   is the stored dtype too coarse?
"""

from __future__ import annotations

from lorica.checkpoint.stream.merging import StreamReport as StreamReport
from lorica.checkpoint.stream.merging import merge as merge
