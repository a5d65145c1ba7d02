"""Grids: many runs from one file, their results, report, and figures."""
