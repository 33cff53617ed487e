"""A whole training step of a decoder: its launches, and what each is expected to take."""
