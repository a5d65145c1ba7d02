"""Benchmarks: timings of a training step and its parts, compared with peers."""
