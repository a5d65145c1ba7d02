"""Dynamic loss scaling for fp16, with the same rule for every engine so that all layouts skip the same steps."""

from __future__ import annotations

from typing import Any

from qsparse_moe.config.schema import LossScaleConfig, RunConfig

_FACTOR = 2.0


class LossScaler:
    """The scale of every micro-batch's mean loss in the backward pass, without which small gradients vanish in fp16.

    Unlike elsewhere, the scaled loss is not divided by the number of micro-batches. Whether a gradient overflows
    therefore does not depend on how many ranks share the global batch.

    A step whose gradient overflows is skipped; after ``hysteresis`` such steps the scale is halved. After more than
    ``window`` steps in a row without an overflow it is doubled. This is the rule of DeepSpeed's ``DynamicLossScaler``
    (a test compares the two). DeepSpeed's optimizer at ZeRO-0 uses another rule, so the engines take the scale from
    this class and set it in DeepSpeed.
    """

    def __init__(self, config: LossScaleConfig, num_micro_batches: int = 1) -> None:
        self._config = config
        self._num_micro_batches = num_micro_batches
        self.scale = _FACTOR**config.initial_power
        self.skipped_steps = 0
        """Number of skipped steps since the run began."""
        self.is_exhausted = False
        """Whether the last step overflowed at the smallest scale, so that training cannot continue."""
        self._hysteresis_left = config.hysteresis
        self._good_steps = 0

    @property
    def factor(self) -> float:
        """Factor to multiply the loss by: the engines then divide by the number of micro-batches, which it cancels."""
        return self.scale * self._num_micro_batches

    def update(self, overflow: bool) -> None:
        """Adapt the scale after a step; ``overflow`` is whether its gradient overflowed and the step was skipped."""
        if not overflow:
            # Counted before this step, as DeepSpeed counts: the scale doubles in step window + 1, not in step window.
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
        """Return the state that a checkpoint stores; JSON-able."""
        return {
            "scale": self.scale,
            "hysteresis_left": self._hysteresis_left,
            "good_steps": self._good_steps,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint."""
        self.scale = float(state["scale"])
        self._hysteresis_left = int(state["hysteresis_left"])
        self._good_steps = int(state["good_steps"])
        self.skipped_steps = int(state["skipped_steps"])


def build_loss_scaler(config: RunConfig, num_micro_batches: int) -> LossScaler | None:
    """Return the scaler of a run in fp16; None in other precisions, which need none.

    Args:
        config: the config of the run.
        num_micro_batches: number of micro-batches per rank and step.
    """
    training = config.training
    return LossScaler(training.loss_scale, num_micro_batches) if training.precision == "fp16" else None
