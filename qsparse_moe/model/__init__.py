"""The decoder-only Transformer around the experts."""
