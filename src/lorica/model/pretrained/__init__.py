"""Support for transformers' models: saving, trainers, heads, class names, vocabularies, checkpoints."""
