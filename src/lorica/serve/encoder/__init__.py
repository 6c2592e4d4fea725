"""Models that read: classes, tags, numbers and vectors of texts, many adapters in one batch.

    rows ──▶ queue ──▶ batches by length ──▶ trunk, an adapter a row ──▶ each adapter's own head

base       the model without its head, its tokenizer, how its vectors are pooled
heads      what stands on the trunk: an adapter's own, as its architecture computes it
fitting    an adapter as an update of the trunk and a head
rows       texts as the model reads them      batching    which rows go together
trunk      an adapter a row in one pass         engine     the queue, and the model's thread
"""

from __future__ import annotations

from lorica.serve.encoder.base import Base as Base
from lorica.serve.encoder.engine import EncoderEngine as EncoderEngine
