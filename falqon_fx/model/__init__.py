"""Calls that act on a whole model, module by module."""
