"""Defaults of an allocation, the same on the command line and in Python. Imports no torch."""

ROUNDS = 3
"""Number of passes that improve a plan."""
NUM_RANDOM = 5
"""Number of random plans that it is compared with."""
