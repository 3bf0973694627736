"""Which steps are committed: the only reader and writer of the commit log."""
