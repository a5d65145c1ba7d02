"""A schedule of S for the Trainer of transformers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError
from transformers import TrainerCallback

from qsparse_moe.config.schema import ScheduleConfig
from qsparse_moe.interop.drop_in.model import current_plan, set_sparsity
from qsparse_moe.interop.drop_in.plans import invalid_setting
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import scheduled_scale


class SparsitySchedule(TrainerCallback):
    """Raises S from 0 to the plan of the model while a ``Trainer`` trains it.

    S is a function of ``state.global_step``, so a resumed training continues it. After the training the model keeps the
    S of the last step.
    """

    def __init__(
        self,
        *,
        ramp_steps: int,
        warmup_steps: int = 0,
        shape: Literal["linear", "cubic", "cosine"] = "linear",
        plan: SparsityPlan | None = None,
    ) -> None:
        """Create the schedule.

        Args:
            ramp_steps: number of optimizer steps in which S rises to the target.
            warmup_steps: number of steps with S = 0 before that.
            shape: shape of the ramp, as in ``model.sparsity.schedule.shape``.
            plan: the target; None: the plan that the model has when the training begins.
        """
        try:
            self.schedule = ScheduleConfig(shape=shape, ramp_steps=ramp_steps, warmup_steps=warmup_steps)
        except ValidationError as error:
            raise invalid_setting("SparsitySchedule", error) from None
        self.plan = plan
        self._scale: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the target and set S of the first step."""
        self.plan = self.plan or current_plan(model)
        self._scale = None
        self.on_step_begin(args, state, control, model=model)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set S of the step."""
        assert self.plan is not None
        scale = scheduled_scale(self.schedule, state.global_step)
        if scale != self._scale:
            set_sparsity(model, self.plan.scaled(scale))
            self._scale = scale
