"""Text to token sequences: sources, tokenizers, packing, tables, streams and the loader that feeds a rank."""
