"""The casts of several adapters in one launch."""
