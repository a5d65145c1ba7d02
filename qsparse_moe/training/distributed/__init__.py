"""The ranks of a run: rendezvous, process groups, collectives, and heartbeats."""
