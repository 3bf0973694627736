"""Load: open, plan, read, place."""
