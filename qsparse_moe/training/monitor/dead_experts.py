"""Says which experts nobody uses. L MoE layers, E experts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.training.distributed.ranks import Distributed

logger = logging.getLogger(__name__)


class DeadExpertMonitor:
    """Warns, on rank 0 and once a window, of every expert that got no row on any rank in a window of steps.

    The rows of steps that are not logged are added up where they are; the step's report reduces them over the ranks
    together with its own, so that nothing here waits for the device.
    """

    def __init__(self, window: int, layers: Sequence[int], distributed: Distributed) -> None:
        """``window`` in steps, 0: never; ``layers`` are the numbers of the MoE layers."""
        self._window = window if layers else 0
        self._layers = layers
        self._distributed = distributed
        self.rows_LE: Tensor | None = None
        """Rows of the steps since the last look, on this rank; None where there are none, or nothing is watched."""
        self._steps = 0
        self._idle_LE: Tensor | None = None

    def add(self, rows_LE: Tensor | None) -> None:
        """Count the rows of one step that is not logged, on this rank."""
        if self._window and rows_LE is not None:
            self._steps += 1
            self.rows_LE = rows_LE if self.rows_LE is None else self.rows_LE + rows_LE

    def look(self, step: int, rows_LE: Tensor | None) -> None:
        """Warn of what has been without a row for one more window, in a logged step.

        Args:
            step: the step at work, counted from 1 as in the reports.
            rows_LE: of all ranks, in this step and those that were added since the last look; on the CPU.
        """
        if not self._window or rows_LE is None:
            return
        got_none_LE, num_steps = rows_LE == 0, self._steps + 1
        before_LE = torch.zeros_like(got_none_LE, dtype=torch.int64) if self._idle_LE is None else self._idle_LE
        self._idle_LE = torch.where(got_none_LE, before_LE + num_steps, 0)
        due_LE = self._idle_LE // self._window > before_LE // self._window
        self.rows_LE, self._steps = None, 0
        if self._distributed.rank == 0:
            for layer, due_E in zip(self._layers, due_LE, strict=True):
                self._warn(step, layer, due_E.nonzero().flatten().tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this rank."""
        return {
            "rows_LE": None if self.rows_LE is None else self.rows_LE.cpu(),
            "steps": self._steps,
            "idle_LE": self._idle_LE,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of as many ranks."""
        if self._window:
            rows_LE = state["rows_LE"]
            self.rows_LE = None if rows_LE is None else rows_LE.to(self._distributed.device)
            self._steps, self._idle_LE = state["steps"], state["idle_LE"]

    def _warn(self, step: int, layer: int, experts: list[int]) -> None:
        if experts:
            logger.warning(
                "step %d: layer %d: experts %s got no row in the last %d steps (metrics.dead_expert_window), and "
                "nothing makes them anew: begin a run with a larger model.moe.load_balance_coefficient, or with "
                "model.moe.bias_update_rate above 0",
                step,
                layer,
                in_ranges(experts),
                self._window,
            )


def in_ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as text: ``[1, 2, 3, 7]`` is ``1-3, 7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)
