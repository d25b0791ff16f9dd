"""Tokenizers: text to ids and back without loss."""
