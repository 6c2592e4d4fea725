"""The training itself: one Trainer, its loss, its optimizer, and what happens around its steps."""
