"""Host memory for saves, under a bound."""
