"""The mathematics of Q-Sparse as pure functions: selection, quantisation, plans, schedules, and statistics."""
