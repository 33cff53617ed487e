"""The cast of x or dL/dO to FP8."""
