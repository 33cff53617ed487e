"""Casts and the write-back of update="rows" on a CPU, as compiled code."""
