"""What a site is made of: FP8 numbers, its base weight, and the spec that its ops carry."""
