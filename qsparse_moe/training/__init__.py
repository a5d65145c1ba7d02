"""The run: engines, steps, evaluation, checkpoints. It emits reports and knows none of its listeners."""
