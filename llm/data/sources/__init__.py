"""Sources of raw data: local files, HTTP, the Hugging Face hub, the standard library."""
