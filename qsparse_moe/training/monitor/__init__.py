"""Monitors of a run: non-finite values, dead experts, agreement of routing, time, memory, and gradients."""
