"""Operations that a CPU computes faster than plain torch does: dropout masks, thin products in compiled code.

masks    drawn, and kept as bits
thin     `thin.c`, compiled for this machine, and its functions
"""
