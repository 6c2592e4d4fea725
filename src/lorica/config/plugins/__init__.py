"""Concerns of few configurations: costly expressions, and fields of PEFT's that lorica lacks."""
