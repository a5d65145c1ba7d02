"""Parameters, FLOPs and bytes from a config and a sparsity plan: pure arithmetic."""
