"""Adapters in the weights: merging, switching, restoring, making final."""
