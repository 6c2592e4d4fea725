"""Kinds of pieces that few adapters have; each file registers its own."""

from __future__ import annotations

from lorica.pieces.plugins import added as added
from lorica.pieces.plugins import architectures as architectures
from lorica.pieces.plugins import blocks as blocks
from lorica.pieces.plugins import looked_up as looked_up
from lorica.pieces.plugins import parameters as parameters
from lorica.pieces.plugins import renamed as renamed
from lorica.pieces.plugins import replicated as replicated
from lorica.pieces.plugins import residual as residual
from lorica.pieces.plugins import tied as tied
from lorica.pieces.plugins import tokens as tokens

# They look at the modules that the others have found.
from lorica.pieces.plugins import statistics as statistics  # isort: skip
