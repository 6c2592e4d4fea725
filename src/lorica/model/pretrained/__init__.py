"""What transformers' models need: saving, trainers, heads, class names, a resized vocabulary, checkpoints."""
