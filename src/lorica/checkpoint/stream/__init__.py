"""Merging an adapter into a checkpoint on disk, a few rows at a time, without making the model.

shards      safetensors files as ranges of bytes
names       the tensor of each module
ties        output embeddings tied to the input's
placement   the rows of each update
plan        the merged checkpoint, before it is written
rounding    the loss to rounding, estimated beforehand
blocks      the merged bytes, a block at a time
staging     an output folder that an interrupted merge can resume
merging     the whole merge, in order
"""

from __future__ import annotations

from lorica.checkpoint.stream.merging import StreamReport as StreamReport
from lorica.checkpoint.stream.merging import merge as merge
