"""The cost of training, beforehand, from a model's configuration alone.

cost       parameters, files, memory and arithmetic of a step; the largest batch that fits
preview    what a configuration would adapt, train whole and add
tracing    a step on the meta device: what it holds at its fullest moment, and computes
"""

from __future__ import annotations

from lorica.study.planning.cost import GPT3 as GPT3
from lorica.study.planning.cost import OPTIMIZERS as OPTIMIZERS
from lorica.study.planning.cost import Plan as Plan
from lorica.study.planning.cost import largest_batch as largest_batch
from lorica.study.planning.cost import plan as plan
from lorica.study.planning.preview import Preview as Preview
from lorica.study.planning.preview import count as count
from lorica.study.planning.preview import preview as preview
