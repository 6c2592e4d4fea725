"""Models larger than one device: an adapted model whose weights are spread over ranks.

sharding      every weight in parts, gathered block by block as it is needed (`fully_shard`, FSDP2)

Torch's own engines do the work; what is here is what they need to know of adapters. Start the processes with
torchrun.
"""

from __future__ import annotations

from lorica.parallel.sharding import gather as gather
from lorica.parallel.sharding import shard as shard
