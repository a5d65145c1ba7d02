"""Grids: many runs from one file, with their results, report, and figures."""
