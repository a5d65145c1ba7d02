"""The change of the loss when the sparsity of one cell of a plan changes: measured and estimated."""
