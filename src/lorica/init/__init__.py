"""How A and B start.

Each module draws from a generator of its own, seeded by (seed, module path): the same seed gives the same
adapter whatever else is adapted, in whatever order, on whichever device and however many processes.

    draws       random factors: Kaiming, normal, orthogonal         W0 stays
    factors     W0's own leading part: PiSSA, OLoRA                 W0 less that part
    covariance  W0 along its inputs: CorDA                          W0 less that part
    gradient    the first step of full fine-tuning: LoRA-GA         W0 less that start
    loftq       what quantizing W0 takes away: LoftQ                W0 quantized
    incremental the inputs' principal directions: EVA               W0 stays
"""

from __future__ import annotations

from lorica.init.covariance import Covariance as Covariance
from lorica.init.covariance import Oriented as Oriented
from lorica.init.covariance import orient as orient
from lorica.init.draws import draw_seed as draw_seed
from lorica.init.draws import generator as generator
from lorica.init.draws import start as start
from lorica.init.draws import start_bias as start_bias
from lorica.init.factors import olora as olora
from lorica.init.factors import pissa as pissa
from lorica.init.gradient import lead as lead
from lorica.init.gradient import lora_ga as lora_ga
from lorica.init.incremental import IncrementalSVD as IncrementalSVD
from lorica.init.incremental import share_ranks as share_ranks
from lorica.init.loftq import compensate as compensate
from lorica.init.loftq import loftq as loftq
from lorica.init.lowrank import Triple as Triple
from lorica.init.lowrank import leading as leading
from lorica.init.quantize import quantized as quantized
