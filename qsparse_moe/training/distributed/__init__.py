"""The ranks of a run: who this process is, its groups, its collectives, and the heartbeat of the others."""
