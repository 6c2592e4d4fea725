"""Text that a model writes: for a user's prompts, and in evaluation, where it is scored."""
