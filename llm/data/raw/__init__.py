"""Raw files: formats, compression, archives, and the records in them."""
