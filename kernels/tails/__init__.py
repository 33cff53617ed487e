"""The columns of adapters in FP8 beside q(x), and beside q(dL/dO)."""
