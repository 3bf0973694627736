"""The bytes side: keys and bytes only."""
