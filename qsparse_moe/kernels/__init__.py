"""Fast implementations of operations of ``sparsity`` and ``moe``, each in a package with its reference."""
