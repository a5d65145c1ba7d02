"""Dynamic loss scaling for fp16: one rule for every engine, so that all layouts skip the same steps."""

from __future__ import annotations

from typing import Any

from qsparse_moe.config.schema import LossScaleConfig, RunConfig

_FACTOR = 2.0


class LossScaler:
    """What every micro-batch's mean loss is multiplied by before the backward: small gradients vanish in fp16.

    It is not divided by the number of micro-batches, as elsewhere: so what overflows does not depend on how many ranks
    share the global batch.

    A step whose gradient overflows is skipped: after ``hysteresis`` of them the scale is halved. After more than
    ``window`` steps in a row without one it is doubled. This is DeepSpeed's ``DynamicLossScaler`` (a test compares);
    its optimizer at ZeRO-0 has another rule, so the engines take the scale from here and DeepSpeed is told it.
    """

    def __init__(self, config: LossScaleConfig, num_micro_batches: int = 1) -> None:
        self._config = config
        self._num_micro_batches = num_micro_batches
        self.scale = _FACTOR**config.initial_power
        self.skipped_steps = 0
        """Since the run began."""
        self.is_exhausted = False
        """The last step overflowed and the scale could not go lower: training cannot go on."""
        self._hysteresis_left = config.hysteresis
        self._good_steps = 0

    @property
    def factor(self) -> float:
        """What a step's gradient carries: the engines average it over a rank's micro-batches, the scale is of each."""
        return self.scale * self._num_micro_batches

    def update(self, overflow: bool) -> None:
        """To be called after every step: whether its gradient overflowed and the step was skipped."""
        if not overflow:
            if self._good_steps and self._good_steps % self._config.window == 0:
                self._hysteresis_left = self._config.hysteresis
                self.scale *= _FACTOR
            self._good_steps += 1
            return
        self.skipped_steps += 1
        self._good_steps = 0
        if self._hysteresis_left > 1:
            self._hysteresis_left -= 1
            return
        self.is_exhausted = self.scale == self._config.minimum
        self.scale = max(self.scale / _FACTOR, float(self._config.minimum))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able."""
        return {
            "scale": self.scale,
            "hysteresis_left": self._hysteresis_left,
            "good_steps": self._good_steps,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.scale = float(state["scale"])
        self._hysteresis_left = int(state["hysteresis_left"])
        self._good_steps = int(state["good_steps"])
        self.skipped_steps = int(state["skipped_steps"])


def build_loss_scaler(config: RunConfig, num_micro_batches: int) -> LossScaler | None:
    """The scaler of a run in fp16; None in another precision, which needs none.

    Args:
        config: of the run.
        num_micro_batches: of a rank in one step.
    """
    training = config.training
    return LossScaler(training.loss_scale, num_micro_batches) if training.precision == "fp16" else None
