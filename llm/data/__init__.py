"""Data: from raw sources to packed sequences of tokens."""
