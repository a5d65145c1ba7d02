"""The learning rate as a pure function of the step, so that checkpoints need no scheduler state."""

from __future__ import annotations

import math

from qsparse_moe.config.schema import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of ``step``, counted from 0.

    It rises linearly to its peak in the last warm-up step and then decays by the schedule. In the last step it is
    ``min_learning_rate_ratio`` of the peak. ``constant`` does not decay.
    """
    done = step + 1
    if done <= config.warmup_steps:
        return config.learning_rate * done / config.warmup_steps
    return config.learning_rate * _ratio(config, min(done, config.steps))


def _ratio(config: TrainingConfig, done: int) -> float:
    """Return the rate relative to its peak, after the warm-up, in the step that completes ``done`` steps."""
    floor = config.min_learning_rate_ratio
    if config.learning_rate_schedule == "constant":
        return 1.0
    if config.learning_rate_schedule == "warmup_stable_decay":
        # Above 1 until the decay begins, which _fraction cuts to 1: the stable phase.
        remaining = _fraction(config.steps - done, config.decay_steps)
        return floor + (1.0 - floor) * remaining
    remaining = _fraction(config.steps - done, config.steps - config.warmup_steps)
    if config.learning_rate_schedule == "cosine":
        remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
    return floor + (1.0 - floor) * remaining


def _fraction(part: int, whole: int) -> float:
    # An empty phase is over at once, so that the rate is at its floor.
    return min(1.0, part / whole) if whole else 0.0
