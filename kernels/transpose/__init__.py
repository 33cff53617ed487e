"""The transpose of W's bytes."""
