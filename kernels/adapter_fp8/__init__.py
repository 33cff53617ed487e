"""The casts of adapters whose b is in FP8, several in two launches."""
