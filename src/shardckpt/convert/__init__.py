"""Other formats in and out; imports neither torch nor jax.

Layer: convert, below cli. Orbax: its files are read and written by their documented structure, its
arrays through tensorstore; the orbax package itself is not needed.
"""
