"""Text to token rows: sources, tokenizers, packing, tables, streams and the loader that feeds a rank."""
