"""Other projects' file formats: Hugging Face folders and tokenizers, SentencePiece, GGUF."""
