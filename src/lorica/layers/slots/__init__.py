"""Slots: adapters mounted side by side on a model's layers, each acting on tokens of its own.

plan      which adapter acts on which token of a packed batch, and how its products are best taken
tables    the factors of the mounted adapters at one layer, stacked; the products
layer     the hook on one layer: factors, DoRA, biases, whole copies
"""

from __future__ import annotations

from lorica.layers.slots.layer import Chosen as Chosen
from lorica.layers.slots.layer import Packed as Packed
from lorica.layers.slots.layer import Part as Part
from lorica.layers.slots.layer import SlotLayer as SlotLayer
from lorica.layers.slots.plan import Place as Place
from lorica.layers.slots.plan import Plan as Plan
from lorica.layers.slots.plan import Run as Run
