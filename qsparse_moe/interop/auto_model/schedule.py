"""The updates of our training between two steps, as a callback of transformers' ``Trainer``.

L MoE layers, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from qsparse_moe.interop.auto_model.library import TrainerCallback
from qsparse_moe.moe.router import UNUSED, Router, bias_update_rate
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import scheduled_scale, ste_share


class ScheduleCallback(TrainerCallback):
    """Follows the schedules of the model's settings: of S, of the straight-through gradient, and of router biases.

    Without it, ``Trainer`` trains at a constant S, and biases stay as they are. It is passed in ``callbacks``; the plan
    of the model at the beginning is the target of the schedule.
    """

    def __init__(self) -> None:
        self._target = SparsityPlan({})
        self._counts: list[_Count] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        """Count the tokens of every expert from now on."""
        self._target = model.model.sparsity_plan
        self._counts = [_Count(router) for router in model.model.routers()]

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        """Set S and the share of the straight-through gradient."""
        config, step = model.model.config, state.global_step
        settings = config.sparsity
        plan = self._target.scaled(scheduled_scale(settings.schedule, step), config.moe.experts_per_token)
        if plan != model.model.sparsity_plan:
            model.set_sparsity(plan)
        model.model.set_ste_share(ste_share(settings, step))

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        """Update the biases of the routers."""
        rate = bias_update_rate(model.model.config.moe, state.global_step - 1)
        counts_LE = [count.take() for count in self._counts]
        if not rate or not counts_LE:
            return
        routed_LE = torch.stack(counts_LE)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(routed_LE)
        model.model.update_router_bias(routed_LE, rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop counting."""
        for count in self._counts:
            count.router.hook = None
        self._counts = []


class _Count:
    """Number of routed tokens per expert of one router since the last ``take``."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._routed_E = self._zeros()
        router.hook = self._add

    def take(self) -> Tensor:
        """Return the counts, and begin again at zero."""
        counts, self._routed_E = self._routed_E, self._zeros()
        return counts

    def _add(self, expert_ids_TA: Tensor) -> None:
        # Not those of evaluations between two steps. A recomputed layer counts every token twice, which does not matter
        # to the signs by which biases move.
        if self.router.training:
            ids = expert_ids_TA[expert_ids_TA != UNUSED]
            self._routed_E.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))

    def _zeros(self) -> Tensor:
        weight = self.router.weight
        return torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
