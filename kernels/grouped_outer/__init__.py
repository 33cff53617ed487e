"""The gradients of experts' adapters."""
