"""Looking at a model while it runs, and at what was wrapped around it."""
