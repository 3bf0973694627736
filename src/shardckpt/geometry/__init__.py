"""Integers only: boxes, layouts, byte runs, dtypes. No arrays, no I/O."""
