"""Warnings of dead experts, to which no token is routed. L MoE layers, E experts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.training.distributed.ranks import Distributed

logger = logging.getLogger(__name__)


class DeadExpertMonitor:
    """Warns once per window, on rank 0, of every expert to which no token was routed on any rank in a window of steps.

    The counts of steps that are not logged are accumulated on the device. The report of the next logged step reduces
    them over the ranks together with its own counts, so that this class never synchronizes with the device.
    """

    def __init__(self, window: int, layers: Sequence[int], distributed: Distributed) -> None:
        """Args: ``window`` is in steps, and 0 disables warnings; ``layers`` are the indices of the MoE layers."""
        # A model without experts needs no window.
        self._window = window if layers else 0
        self._layers = layers
        self._distributed = distributed
        self.routed_LE: Tensor | None = None
        """Number of this rank's tokens routed to each expert since the last report, if any step was added."""
        self._steps = 0
        self._idle_LE: Tensor | None = None
        """Number of steps since each expert last received a token, over all ranks."""

    def add(self, routed_LE: Tensor | None) -> None:
        """Accumulate this rank's counts of a step that is not logged."""
        if self._window and routed_LE is not None:
            self._steps += 1
            self.routed_LE = routed_LE if self.routed_LE is None else self.routed_LE + routed_LE

    def check(self, step: int, routed_LE: Tensor | None) -> None:
        """Warn in a logged step of the experts that have been without a token for one more window.

        Args:
            step: number of the step, counted from 1 as in the reports.
            routed_LE: number of tokens of all ranks routed to each expert since the last report, on the CPU.
        """
        if not self._window or routed_LE is None:
            return
        got_none_LE, num_steps = routed_LE == 0, self._steps + 1
        # Counts within the interval are summed, so an expert with a token anywhere in it starts again at 0.
        before_LE = torch.zeros_like(got_none_LE, dtype=torch.int64) if self._idle_LE is None else self._idle_LE
        self._idle_LE = torch.where(got_none_LE, before_LE + num_steps, 0)
        # A logging interval may skip the exact end of a window, so the number of completed windows is compared.
        due_LE = self._idle_LE // self._window > before_LE // self._window
        self.routed_LE, self._steps = None, 0
        if self._distributed.rank == 0:
            for layer, due_E in zip(self._layers, due_LE, strict=True):
                self._warn(step, layer, due_E.nonzero().flatten().tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state for a checkpoint."""
        return {
            # The names of earlier versions, which checkpoints contain.
            "rows_LE": None if self.routed_LE is None else self.routed_LE.cpu(),
            "steps": self._steps,
            "idle_LE": self._idle_LE,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint of the same number of ranks."""
        if self._window:
            routed_LE = state["rows_LE"]
            self.routed_LE = None if routed_LE is None else routed_LE.to(self._distributed.device)
            self._steps, self._idle_LE = state["steps"], state["idle_LE"]

    def _warn(self, step: int, layer: int, experts: list[int]) -> None:
        if experts:
            logger.warning(
                "step %d: layer %d: experts %s received no token in the last %d steps (metrics.dead_expert_window), "
                "and dead experts do not recover by themselves: start a run with a larger "
                "model.moe.load_balance_coefficient, or with model.moe.bias_update_rate above 0",
                step,
                layer,
                in_ranges(experts),
                self._window,
            )


def in_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text: ``[1, 2, 3, 7]`` becomes ``1-3, 7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)
