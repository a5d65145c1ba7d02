"""Training: engines, steps, evaluations, and checkpoints. It emits reports and does not depend on its listeners."""
