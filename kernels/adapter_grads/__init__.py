"""dL/dB and dL/dA."""
