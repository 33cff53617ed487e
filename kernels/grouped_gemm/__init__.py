"""FP8 products of rows with the stacked weights of their experts."""
