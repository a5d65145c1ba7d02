"""Laws of the loss in model size, expert sparsity, activation sparsity and tokens, fitted to the results of runs."""
