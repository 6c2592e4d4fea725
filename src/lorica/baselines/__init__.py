"""The LoRA paper's other methods, each a configuration that `lorica.adapt` takes.

selective (trains some of the base)     `FullConfig`, `TopConfig`, `BitFitConfig`
additive (adds parts to the model)      `AdapterHConfig`, `AdapterLConfig`, `AdapterPConfig`,
                                        `AdapterDConfig`, `PreEmbedConfig`, `PreLayerConfig`
"""

from __future__ import annotations

from lorica.baselines.bitfit import BitFitConfig as BitFitConfig
from lorica.baselines.bottleneck import AdapterDConfig as AdapterDConfig
from lorica.baselines.bottleneck import AdapterHConfig as AdapterHConfig
from lorica.baselines.bottleneck import AdapterLConfig as AdapterLConfig
from lorica.baselines.bottleneck import AdapterPConfig as AdapterPConfig
from lorica.baselines.partial import FullConfig as FullConfig
from lorica.baselines.partial import TopConfig as TopConfig
from lorica.baselines.prefix import PreEmbedConfig as PreEmbedConfig
from lorica.baselines.prefix import PreLayerConfig as PreLayerConfig
