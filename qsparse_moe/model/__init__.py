"""The decoder-only Transformer and what is computed on it: initial values, recomputation, thresholds, and unions."""
