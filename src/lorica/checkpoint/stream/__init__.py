"""Merging an adapter into a checkpoint on disk, a few rows at a time, without making the model.

shards      safetensors files as ranges of bytes
names       which tensor of a file a module is
ties        output embeddings that are the input's
placement   which rows get which update
plan        the merged checkpoint, before it is written
rounding    whether the stored dtype is too coarse
blocks      the bytes, a block at a time
staging     a folder that can be gone on with
merging     all of it, in order
"""

from __future__ import annotations

from lorica.checkpoint.stream.merging import StreamReport as StreamReport
from lorica.checkpoint.stream.merging import merge as merge
