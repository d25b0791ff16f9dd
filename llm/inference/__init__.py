"""Generation with a key/value cache, and chat in the terminal."""
