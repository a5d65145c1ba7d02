"""Skipping of steps whose gradient is not finite or is an outlier; see ``training.skip_steps``."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from typing import Any

from qsparse_moe.config.schema import SkipStepsConfig
from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.training.engines.protocol import Engine
from qsparse_moe.training.monitor.layer_gradients import gradient_norm

logger = logging.getLogger(__name__)


class StepFilter:
    """Decides for every step whether its gradient may change the weights; the decision is the same on every rank.

    An outlier is a gradient norm greater than the mean of the norms of earlier steps by more than ``sigma`` standard
    deviations. Norms of skipped steps are not among them, so that a skipped spike does not hide the next one. OLMo-core
    (its SkipStepAdamW) skips by the same rule.
    """

    def __init__(self, settings: SkipStepsConfig) -> None:
        self._settings = settings
        self._norms: deque[float] = deque(maxlen=settings.window)
        self._recent: deque[bool] = deque(maxlen=settings.window)
        self.num_skipped = 0
        """Number of steps skipped since the run began."""

    def skips(self, engine: Engine, step: int, *, fault: str) -> float | None:
        """Return the norm of the step's gradient if the step must be skipped, else None. All ranks call it together.

        Call it between the last backward of a step and ``update``.

        Args:
            engine: the engine with the gradient of the step.
            step: number of the step, counted from 1, for messages.
            fault: where the forward or backward pass was not finite; empty if everything was.

        Raises:
            TrainingDiverged: more than ``limit`` of the last ``window`` steps would be skipped.
        """
        norm = gradient_norm(engine)
        # In fp16 the loss scale decides over a gradient that overflows, and skips the step itself.
        if not fault and not math.isfinite(norm) and engine.loss_scaler is not None:
            return None
        reason = fault or self._outlier(norm)
        self._recent.append(bool(reason))
        if not reason:
            self._norms.append(norm)
            return None
        self.num_skipped += 1
        self._check_limit(step, reason)
        if engine.distributed.rank == 0:
            logger.warning(
                "step %d: skipped because %s; %d steps were skipped since the start of the run",
                step,
                reason,
                self.num_skipped,
            )
        return norm

    def _outlier(self, norm: float) -> str:
        """Return why a gradient of this norm is not used, or an empty text."""
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        # The mean and deviation of a few norms at the start of a run say nothing about those that follow.
        if not self._settings.sigma or len(self._norms) < max(2, self._settings.window // 2):
            return ""
        mean, deviation = statistics.fmean(self._norms), statistics.stdev(self._norms)
        if norm <= mean + self._settings.sigma * deviation:
            return ""
        return (
            f"its gradient norm, {norm:.3g}, is more than {self._settings.sigma:g} standard deviations "
            f"({deviation:.3g}) above the mean of the {len(self._norms)} steps before it, {mean:.3g}"
        )

    def _check_limit(self, step: int, reason: str) -> None:
        if sum(self._recent) > self._settings.limit:
            raise TrainingDiverged(
                f"step {step}: {reason}, and {sum(self._recent)} of the last {len(self._recent)} steps would be "
                f"skipped, more than training.skip_steps.limit ({self._settings.limit}). Nothing of this step was "
                "saved. Lower training.learning_rate, lengthen training.warmup_steps, or raise the limit, and resume "
                "from the last checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores; JSON-able."""
        return {"norms": list(self._norms), "recent": list(self._recent), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint; of a longer window than this run's, the newest entries count."""
        self._norms.extend(state["norms"])
        self._recent.extend(state["recent"])
        self.num_skipped = int(state["num_skipped"])


def build_step_filter(settings: SkipStepsConfig) -> StepFilter | None:
    """Return the filter of a run; None if it skips no steps."""
    return StepFilter(settings) if settings.limit else None
