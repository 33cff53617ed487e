"""dL/dB."""
