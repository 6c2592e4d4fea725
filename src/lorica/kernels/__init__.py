"""What a CPU computes faster than plain torch: dropout masks, and thin products by compiled code.

masks    drawn, and kept as bits
thin     `thin.c`, compiled for this machine, and its functions
"""
