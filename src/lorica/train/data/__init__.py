"""The rows of a run: where they come from, which can be used, what their columns and labels say."""
