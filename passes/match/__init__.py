"""Matching: what belongs to a site, and why a LoRA-like pair is none."""
