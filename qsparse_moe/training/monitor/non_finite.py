"""Detects values that are not finite before they reach the weights. L layers.

In fp16 a gradient may overflow because the loss is scaled; such a step is skipped, and training continues. A value in
the forward pass that is not finite, or an overflow at the smallest scale, ends the run: no other scale would help.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.loss_scale import LossScaler

logger = logging.getLogger(__name__)


CANNOT_CONTINUE = 1000
"""Value of ``stop`` on a rank that has no data for the next step or cannot write; greater than every signal."""


class Requests(NamedTuple):
    """The requests of the ranks after a step."""

    stop: int = 0
    """The number of a signal, ``CANNOT_CONTINUE``, or 0."""
    save: bool = False
    """Whether a checkpoint is requested."""


class NonFiniteGuard:
    """Sums each layer's output and the gradient that enters it; a sum is finite only if all of its terms are.

    The sums stay on the device. ``check`` reads them once per step, and sends the requests to stop and to save to all
    ranks in the same small reduction.
    """

    def __init__(
        self,
        num_layers: int,
        distributed: Distributed,
        loss_scaler: LossScaler | None = None,
        *,
        raises: bool = True,
    ) -> None:
        """Args: with ``raises=False``, ``check`` stores what it finds in ``fault``, for a run that may skip steps."""
        self._distributed = distributed
        self._loss_scaler = loss_scaler
        self._raises = raises
        self.fault = ""
        """The value of this step that is not finite, in words; empty if all are."""
        self._overflow_place = ""
        self._num_layers = num_layers
        self._forward_L = torch.zeros(num_layers, device=distributed.device)
        self._backward_L = torch.zeros(num_layers, device=distributed.device)
        self._loss = torch.zeros(1, device=distributed.device)

    def layer_hook(self, layer: int, hidden: Tensor) -> None:
        """Add a layer's output; called in the forward pass, where the output is part of the graph."""
        # In fp32: sums of finite fp16 values would overflow.
        self._forward_L[layer] += hidden.detach().sum(dtype=torch.float32)
        if hidden.requires_grad:

            def add_gradient(grad: Tensor) -> None:
                self._backward_L[layer] += grad.sum(dtype=torch.float32)

            hidden.register_hook(add_gradient)

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's loss."""
        self._loss += loss.detach().float()

    def check(self, step: int, *, stop: int, save: bool = False) -> Requests:
        """Raise on every rank if any rank has seen a value that is not finite since the last call.

        Args:
            step: number of the step, counted from 1 as in the reports.
            stop: the signal that this rank has received, ``CANNOT_CONTINUE``, or 0.
            save: whether this rank requests a checkpoint after the step.

        Returns:
            The highest ``stop`` of all ranks, and whether any rank requests a checkpoint; the same on every rank.

        Raises:
            TrainingDiverged: the message has the step, the layer, and the lowest rank that has seen the value. With
                ``raises=False`` the same words, without the step, are in ``fault``.
        """
        sums = torch.cat((self._forward_L, self._backward_L, self._loss))
        # The maximum over the ranks then identifies the lowest rank.
        flags = torch.where(sums.isfinite(), 0, self._distributed.world_size - self._distributed.rank)
        flags = torch.cat((flags, flags.new_tensor((stop, int(save)))))
        # The only wait for the device in a step that is not logged.
        *found, stop, save_requested = self._distributed.all_reduce(flags, dist.ReduceOp.MAX).tolist()
        for buffer in (self._forward_L, self._backward_L, self._loss):
            buffer.zero_()
        # Set only by an overflow in this step; check_norm reports it after the update.
        self._overflow_place = self.fault = ""
        if any(found):
            place = self._place(found)
            if self._loss_scaler is not None and self._is_backward_only(found):
                self._overflow_place = f" ({place})"
            elif self._raises:
                raise TrainingDiverged(f"step {step}: {place}. {_WAY_OUT}")
            else:
                self.fault = place
        return Requests(stop, bool(save_requested))

    def check_norm(self, step: int, grad_norm: float) -> None:
        """Check the gradient norm, the same on all ranks, after the engine's update; in fp16 log a skipped step.

        Raises:
            TrainingDiverged: the norm is not finite although all sums of layers are; in fp16 only if the loss scale is
                already at its minimum.
        """
        if math.isfinite(grad_norm):
            return
        scaler = self._loss_scaler
        if scaler is None:
            raise TrainingDiverged(f"step {step}: the gradient norm is {grad_norm}. {_WAY_OUT}")
        if scaler.is_exhausted:
            raise TrainingDiverged(
                f"step {step}: the gradient overflows fp16 at the smallest loss scale, {scaler.scale:g} "
                f"(training.loss_scale.minimum){self._overflow_place}. {_WAY_OUT}"
            )
        if self._distributed.rank == 0:
            logger.warning(
                "step %d: skipped because its gradient overflows fp16%s; the loss scale of the next step is %g",
                step,
                self._overflow_place,
                scaler.scale,
            )

    def _is_backward_only(self, found: list[int]) -> bool:
        return not any(found[: self._num_layers]) and not found[-1]

    def _place(self, found: list[int]) -> str:
        forward, backward = found[: self._num_layers], found[self._num_layers : -1]
        if any(forward):
            # The forward pass runs from the first layer up: the lowest one is where it began.
            place = next(layer for layer, flag in enumerate(forward) if flag)
            what, flag = f"the output of layer {place}", forward[place]
        elif found[-1]:
            what, flag = "the loss", found[-1]
        else:
            # The backward pass runs from the last layer down: the highest one is where it began.
            place = max(layer for layer, flag in enumerate(backward) if flag)
            what, flag = f"the gradient that enters layer {place} from above", backward[place]
        rank = self._distributed.world_size - flag
        return f"{what} is not finite on rank {rank}"


_WAY_OUT = (
    "Nothing of this step was saved. Lower training.learning_rate, lengthen training.warmup_steps, or set "
    "training.gradient_clipping, or resume from the last checkpoint"
)
