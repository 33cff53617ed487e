"""The passes: normalize, match, plan, autotune, rewrite, insert updates, verify; one a file."""
