"""The rows that a run would learn from, before anything is trained: `preview` reports, and loads no model.

report  the rows of each split: lengths, cuts, duplicates, labels; the first as the model will see them
seen    a row as the model sees it: its text in stretches, those that are learned marked
"""

from lorica.train.preview.report import DataReport, SplitReport, preview
from lorica.train.preview.seen import Seen, Stretch, seen

__all__ = ["DataReport", "Seen", "SplitReport", "Stretch", "preview", "seen"]
