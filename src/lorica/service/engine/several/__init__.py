"""Several engines over one base.

engines    which of them has a run
process    does an engine's passes, beside this one
memory     where processes see the same adapters
"""
