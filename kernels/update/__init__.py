"""The write-back of update="rows"."""
