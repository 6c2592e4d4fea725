"""Inits that few adapters need: those that look at data, or at what quantizing takes away."""
