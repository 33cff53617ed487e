"""The ``falqon::`` ops: what a graph says, and what is computed. Every file here is
hashed into the spec.
"""
