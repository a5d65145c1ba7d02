"""Plans that spend one budget over all cells, beside rival plans of the same cost."""
