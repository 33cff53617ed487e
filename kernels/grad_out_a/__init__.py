"""dL/dO_A."""
