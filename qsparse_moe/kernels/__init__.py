"""The operations of ``sparsity`` and ``moe`` made fast, each beside its reference."""
