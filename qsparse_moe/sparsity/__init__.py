"""Q-Sparse as pure functions: which features a row keeps, what is done with them, and what that did."""
