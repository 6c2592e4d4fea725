"""Models larger than one device: an adapted model whose weights are spread over ranks.

sharding      every weight in parts, gathered block by block as it is needed (`fully_shard`, FSDP2)
tensor        the weights of a layer split, each rank computing its part (tensor parallel)
meta          a model made without values, which come from files part by part
checkpoints   what trains and its optimizer, to go on from on any number of ranks
sources       where a base's values come from

Torch's own engines do the work; what is here is what they need to know of adapters. Start the processes with
torchrun.
"""

from __future__ import annotations

from lorica.parallel.checkpoints import load_checkpoint as load_checkpoint
from lorica.parallel.checkpoints import save_checkpoint as save_checkpoint
from lorica.parallel.meta import materialize as materialize
from lorica.parallel.sharding import gather as gather
from lorica.parallel.sharding import shard as shard
from lorica.parallel.tensor import Colwise as Colwise
from lorica.parallel.tensor import Rowwise as Rowwise
from lorica.parallel.tensor import split as split
