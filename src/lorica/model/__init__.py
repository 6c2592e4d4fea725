"""The adapted model: operations on a model that carries adapters."""

from __future__ import annotations

from lorica.model.activate import active as active
from lorica.model.activate import disabled as disabled
from lorica.model.adapt import adapt as adapt
from lorica.model.adapt import adapters as adapters
from lorica.model.adapt import attach as attach
from lorica.model.adapt import detach as detach
from lorica.model.adapt import load as load
from lorica.model.count import ParameterCount as ParameterCount
from lorica.model.count import trainable_parameters as trainable_parameters
from lorica.model.files import extract as extract
from lorica.model.files import load_weights as load_weights
from lorica.model.files import save as save
from lorica.model.hub import push_to_hub as push_to_hub
from lorica.model.merging import plugins as plugins
from lorica.model.merging.folded import MergeReport as MergeReport
from lorica.model.merging.merge import merge as merge
from lorica.model.merging.merge import restore as restore
from lorica.model.merging.merge import switch as switch
from lorica.model.merging.merged import finalize as finalize
from lorica.model.merging.plugins.delta import delta_weight as delta_weight
from lorica.model.mixed import mixed as mixed
