"""The LoRA paper's other methods, each a configuration that `lorica.adapt` takes.

selective (trains some of the base)     `FullConfig`, `TopConfig`, `BitFitConfig`
additive (adds parts to the model)      `AdapterHConfig`, `AdapterLConfig`, `AdapterPConfig`,
                                        `AdapterDConfig`, `PreEmbedConfig`, `PreLayerConfig`
several in one adapter                  `Combination`
"""

from __future__ import annotations

from lorica.methods.bitfit import BitFitConfig as BitFitConfig
from lorica.methods.bottleneck import AdapterDConfig as AdapterDConfig
from lorica.methods.bottleneck import AdapterHConfig as AdapterHConfig
from lorica.methods.bottleneck import AdapterLConfig as AdapterLConfig
from lorica.methods.bottleneck import AdapterPConfig as AdapterPConfig
from lorica.methods.combination import Combination as Combination
from lorica.methods.partial import FullConfig as FullConfig
from lorica.methods.partial import TopConfig as TopConfig
from lorica.methods.prefix import PreEmbedConfig as PreEmbedConfig
from lorica.methods.prefix import PreLayerConfig as PreLayerConfig
