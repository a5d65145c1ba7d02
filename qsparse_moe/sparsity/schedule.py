"""How far S, and the share of the straight-through gradient, have come at a step. Imports no torch."""

from __future__ import annotations

import math

from qsparse_moe.config.schema import ScheduleConfig, SparsityConfig

_SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    # Zhu & Gupta 2017 (arXiv 1710.01878): fast at first, slow near the target.
    "cubic": lambda progress: 1.0 - (1.0 - progress) ** 3,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
}


def scheduled_scale(schedule: ScheduleConfig, step: int) -> float:
    """The factor in [0, 1] of the target S that holds in ``step`` (counted from 0): a pure function, so it resumes.

    0 during the dense warm-up, then along the shape, 1 from the end of the ramp on.
    """
    since_warmup = step - schedule.warmup_steps
    if since_warmup < 0:
        return 0.0
    if since_warmup >= schedule.ramp_steps:
        return 1.0
    return _SHAPES[schedule.shape](since_warmup / schedule.ramp_steps)


def ste_share(settings: SparsityConfig, step: int) -> float:
    """The share of the straight-through gradient in ``step`` (counted from 0), the rest being the masked one.

    1 for ``ste``, 0 for ``masked``; for ``blend`` from its start along its shape to its end: a pure function of the
    step, so it resumes.
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
