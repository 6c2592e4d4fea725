"""Kinds of layers that few adapters have."""
