"""Differences between a sparse model and a reference that the loss does not show."""
