"""Timings of a step and its parts beside their peers."""
