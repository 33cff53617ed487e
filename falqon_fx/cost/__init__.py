"""Predicted times: cards, kernels, a layer's step."""
