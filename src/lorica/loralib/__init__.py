"""loralib's layers and helpers, name for name: ``import lorica.loralib as lora``.

The constructors, parameter names and checkpoints are those of microsoft/LoRA's loralib 0.1.2, and so is what
a seed draws. What is broken there is right here:

    eval() and train()      return the module; W0 comes back bit for bit, however often they are called
    state_dict()            holds W0 in evaluation too, so a checkpoint never has the update in it twice
    load_state_dict()       may be called in evaluation: what was merged is dropped first
    Conv1d, Conv3d          work with any kernel size; lora_dropout acts in all three
    Embedding               keeps a table it is given; max_norm renorms the table's rows, not A
    MergedLinear            takes an `enable_lora` without a True in it, and sequences of any type
    bias="lora_only"        means the layers that have an update, convolutions too; what trains is saved
    pickle                  works: there is no lambda in a layer
"""

from __future__ import annotations

from lorica.loralib.layers import Conv1d as Conv1d
from lorica.loralib.layers import Conv2d as Conv2d
from lorica.loralib.layers import Conv3d as Conv3d
from lorica.loralib.layers import ConvLoRA as ConvLoRA
from lorica.loralib.layers import Embedding as Embedding
from lorica.loralib.layers import Linear as Linear
from lorica.loralib.layers import LoRALayer as LoRALayer
from lorica.loralib.layers import MergedLinear as MergedLinear
from lorica.loralib.utils import lora_state_dict as lora_state_dict
from lorica.loralib.utils import mark_only_lora_as_trainable as mark_only_lora_as_trainable
from lorica.loralib.utils import merged_state_dict as merged_state_dict
