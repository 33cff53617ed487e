"""What update="rows" keeps on record of a site beside its weight: the columns of ``counters``."""

from __future__ import annotations

from falqon_fx.kernels.cpu import native

COUNTERS = native.COUNTERS

FINGERPRINT_B, FINGERPRINT_A, FINGERPRINT_W = range(3)
STEP, SITE, NONFINITE, STALE, TOO_LARGE = range(3, COUNTERS)
