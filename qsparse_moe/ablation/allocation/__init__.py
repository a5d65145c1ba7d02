"""Plans that spend a budget over all cells, compared with rival plans of the same cost."""
