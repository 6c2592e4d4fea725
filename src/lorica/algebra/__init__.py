"""Adapters in, adapter out: sums, combinations and compression, without a model.

concatenate, add, subtract, scale     exact
compress                              to a rank, or to the smallest rank that keeps a share of the energy
combine                               PEFT's methods, by their names
error                                 the distance of a result from the sum
"""

from __future__ import annotations

from lorica.algebra.combination import METHODS as METHODS
from lorica.algebra.combination import combine as combine
from lorica.algebra.compression import compress as compress
from lorica.algebra.exact import add as add
from lorica.algebra.exact import concatenate as concatenate
from lorica.algebra.exact import scale as scale
from lorica.algebra.exact import subtract as subtract
from lorica.algebra.report import ErrorReport as ErrorReport
from lorica.algebra.report import LayerError as LayerError
from lorica.algebra.report import error as error
