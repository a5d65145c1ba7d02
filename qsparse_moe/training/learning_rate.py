"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from qsparse_moe.config.schema import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of ``step``, counted from 0.

    It rises linearly to the peak, which the last warm-up step has, and after the schedule's decay the run's last step
    has ``min_learning_rate_ratio`` of it. ``constant`` keeps the peak.
    """
    done = step + 1
    if done <= config.warmup_steps:
        return config.learning_rate * done / config.warmup_steps
    return config.learning_rate * _ratio(config, min(done, config.steps))


def _ratio(config: TrainingConfig, done: int) -> float:
    """The rate over its peak after the warm-up, when ``done`` steps end with this one."""
    floor = config.min_learning_rate_ratio
    if config.learning_rate_schedule == "constant":
        return 1.0
    if config.learning_rate_schedule == "warmup_stable_decay":
        remaining = _fraction(config.steps - done, config.decay_steps)
        return floor + (1.0 - floor) * remaining
    remaining = _fraction(config.steps - done, config.steps - config.warmup_steps)
    if config.learning_rate_schedule == "cosine":
        remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
    return floor + (1.0 - floor) * remaining


def _fraction(part: int, whole: int) -> float:
    return min(1.0, part / whole) if whole else 0.0
