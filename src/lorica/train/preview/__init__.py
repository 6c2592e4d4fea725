"""What a run would learn from, before anything is trained: `preview` says it, and no model is loaded.

report  the rows of each split: lengths, cuts, duplicates, labels; the first as the model will see them
seen    a row as the model sees it: its text in stretches, those that are learned marked
"""

from lorica.train.preview.report import DataReport, SplitReport, preview
from lorica.train.preview.seen import Seen, Stretch, seen

__all__ = ["DataReport", "Seen", "SplitReport", "Stretch", "preview", "seen"]
