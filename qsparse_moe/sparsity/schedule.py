"""Schedules of S and of the weight of the straight-through gradient over the steps. Imports no torch."""

from __future__ import annotations

import math

from qsparse_moe.config.schema import ScheduleConfig, SparsityConfig

_SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    # Zhu & Gupta 2017 (arXiv 1710.01878): S rises fast at first and slowly near the target.
    "cubic": lambda progress: 1.0 - (1.0 - progress) ** 3,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
}


def scheduled_scale(schedule: ScheduleConfig, step: int) -> float:
    """Return the factor in [0, 1] of the target S in ``step``, counted from 0.

    It is 0 during the dense warm-up, follows the shape during the ramp, and is 1 from then on. It is a pure function of
    the step, so a resumed run continues the schedule.
    """
    since_warmup = step - schedule.warmup_steps
    if since_warmup < 0:
        return 0.0
    # Before the quotient below, because a ramp may have 0 steps.
    if since_warmup >= schedule.ramp_steps:
        return 1.0
    return _SHAPES[schedule.shape](since_warmup / schedule.ramp_steps)


def ste_share(settings: SparsityConfig, step: int) -> float:
    """Return the weight of the straight-through gradient in ``step``, counted from 0; the masked one has the rest.

    It is 1 for ``ste`` and 0 for ``masked``. For ``blend`` it goes from its start to its end along its shape. It is a
    pure function of the step, so a resumed run continues the schedule.
    """
    if settings.gradient != "blend":
        return 1.0 if settings.gradient == "ste" else 0.0
    blend = settings.blend
    since_hold = step - blend.hold_steps
    if since_hold < 0:
        return blend.start
    if since_hold >= blend.ramp_steps:
        return blend.end
    return blend.start + (blend.end - blend.start) * _SHAPES[blend.shape](since_hold / blend.ramp_steps)
