"""Metrics of a run: their definitions, and the listener that records them as JSON lines and for TensorBoard."""
