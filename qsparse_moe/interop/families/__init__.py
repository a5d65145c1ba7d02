"""Architectures of Hugging Face models that this package's model can express, one per file."""
