"""The passes: normalize → match → plan → rewrite → insert updates → verify, one a file."""
