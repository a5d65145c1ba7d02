"""Q-Sparse inside models of transformers: put in by ``model.sparsify``, taken out by ``model.densify``."""
