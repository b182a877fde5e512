"""A student becomes a Bundle: one format, one precision, and the proof that it still answers the same."""
