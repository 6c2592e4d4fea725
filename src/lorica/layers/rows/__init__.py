"""An adapter for each row of a batch.

batch    rows gathered by adapter, and two batched products for all of them
blocks   the adapters' factors, side by side in memory
stack    those of some adapters, for two batched products
axes     whether the first axis of a layer's input is the batch
"""

from __future__ import annotations

from lorica.layers.rows.axes import Axes as Axes
from lorica.layers.rows.axes import Witness as Witness
from lorica.layers.rows.batch import Rows as Rows
from lorica.layers.rows.blocks import Blocks as Blocks
from lorica.layers.rows.stack import Stack as Stack
