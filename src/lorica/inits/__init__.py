"""How A and B start on a layer.

Each module draws from a generator of its own, seeded by (seed, module path): the same seed gives the same
adapter whatever else is adapted, in whatever order, on whichever device and however many processes.

    draws       random factors: Kaiming, normal, orthogonal         W0 stays
    factors     W0's own leading part: PiSSA, OLoRA                 W0 less that part
    covariance  W0 along its inputs: CorDA                          W0 less that part
    gradient    the first step of full fine-tuning: LoRA-GA         W0 less that start
    loftq       what quantizing W0 takes away: LoftQ                W0 quantized
    incremental the inputs' principal directions: EVA               W0 stays

An init is a class with one method, `Init.factors`, registered under its value of `init_lora_weights`.
"""

from __future__ import annotations

from lorica.inits.draws import draw_seed as draw_seed
from lorica.inits.draws import generator as generator
from lorica.inits.draws import start as start
from lorica.inits.draws import start_bias as start_bias
from lorica.inits.init import INITS as INITS
from lorica.inits.init import PREPARED as PREPARED
from lorica.inits.init import Init as Init
from lorica.inits.init import Initial as Initial
from lorica.inits.init import Residual as Residual
from lorica.inits.init import base_weight as base_weight
from lorica.inits.init import check_alone as check_alone
from lorica.inits.init import of as of
from lorica.inits.init import register as register
from lorica.inits.init import residual_of as residual_of
from lorica.inits.init import subtract as subtract
from lorica.inits.plugins.covariance import Covariance as Covariance
from lorica.inits.plugins.covariance import Oriented as Oriented
from lorica.inits.plugins.covariance import orient as orient
from lorica.inits.plugins.factors import olora as olora
from lorica.inits.plugins.factors import pissa as pissa
from lorica.inits.plugins.gradient import lead as lead
from lorica.inits.plugins.gradient import lora_ga as lora_ga
from lorica.inits.plugins.incremental import IncrementalSVD as IncrementalSVD
from lorica.inits.plugins.incremental import share_ranks as share_ranks
from lorica.inits.plugins.loftq import compensate as compensate
from lorica.inits.plugins.loftq import loftq as loftq
from lorica.inits.plugins.lowrank import Triple as Triple
from lorica.inits.plugins.lowrank import leading as leading
from lorica.inits.plugins.quantize import quantized as quantized
