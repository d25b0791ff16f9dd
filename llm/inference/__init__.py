"""Using a trained model: generation with a key/value cache."""
