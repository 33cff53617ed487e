"""``update="rows"``: the paper's method, which writes each optimizer step into W' row by row.

W' = [W; A] is one FP8 matrix that a step changes in place: ``falqon::proxy_update_`` writes the
rows of W whose change of B is largest (arXiv 2510.24061). Nothing outside of this package knows of
applied parts, fingerprints, counters or aliases; the default, ``update="adapter"``, has none.
"""
