"""The transformer itself: read transformer.py from top to bottom, then loss.py and store.py."""
