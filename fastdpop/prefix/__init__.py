"""What sequences share, once: tries of token ids and attention over them. Nothing here knows of Hugging Face."""
