"""Checkpoints that any engine, ZeRO stage, and number of ranks can write and read."""
