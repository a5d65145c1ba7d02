"""The interface of an engine: what a training step and a checkpoint need of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import LayerHook, Transformer
from qsparse_moe.moe.expert_group import ALONE, ExpertGroup
from qsparse_moe.training.distributed.collectives import PatchTarget
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.loss_scale import LossScaler

StateKind = Literal["weight", "exp_avg", "exp_avg_sq"]
STATE_KINDS: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
"""What training keeps of every parameter: the fp32 weight and Adam's two moments."""

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By ``training.precision``: of the weights that compute, and of activations."""


class Engine(Protocol):
    """A model with its optimizer, spread over the ranks in some way. Every method is called by all ranks together."""

    name: str
    model: Transformer
    distributed: Distributed
    num_micro_batches: int
    """That a rank sends through in one step."""
    kept_collectives: Sequence[PatchTarget]
    """Where a library keeps functions of torch.distributed under other names, for whoever measures them."""
    loss_scaler: LossScaler | None
    """Multiplies the loss in fp16; None in another precision."""

    def forward(self, batch: Batch, *, with_stats: bool, layer_hook: LayerHook | None = None) -> ModelOutput:
        """The model's output for a batch of the host; with gradients unless they are disabled around the call."""

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this micro-batch's gradient, divided by ``num_micro_batches``.

        After the step's last micro-batch the gradients are reduced over the ranks as far as the engine does it here.
        """

    def gradient_shard(self, name: str) -> Tensor:
        """What this rank holds of the gradient of the parameter ``name``, before clipping: flat, on any device.

        To be read between the step's last backward and ``update``, and left as it is. The gradient is the mean over
        the global batch; the ranks' parts hold every element of it once, and beside those nothing but zeros.
        """

    def update(self, learning_rate: float) -> float:
        """Clip the gradient, take the optimizer step and drop the gradient; in fp16 adapt the loss scale.

        Returns:
            The norm of the global batch's gradient before clipping. Where it is not finite the weights may be lost,
            but not in fp16: there it is infinite when the scaled gradient overflowed and the step was skipped.
        """

    def get_full(self, name: str, kind: StateKind) -> Tensor:
        """The whole fp32 tensor of the parameter ``name``; on the device, to be used up before the next step."""

    def set_full(self, name: str, kind: StateKind, value: Tensor) -> None:
        """Put the whole fp32 tensor in place. A weight must be the one that the model was built with."""

    @property
    def adam_step(self) -> int:
        """Adam's step counter."""

    @adam_step.setter
    def adam_step(self, step: int) -> None: ...

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter by its name in the state dict; a tied one occurs once."""

    def describe(self) -> dict[str, Any]:
        """What the manifest should say of it."""

    def close(self) -> None:
        """Let go of hooks and buffers."""


def num_micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches that one rank sends through in a step."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * world_size)


def equal_shard(value: Tensor, distributed: Distributed, group: ExpertGroup = ALONE) -> Tensor:
    """This rank's share of a tensor that every rank holds whole, or every rank of its place in a ``group``: a flat
    view; the shares differ by one at most."""
    return value.flatten().tensor_split(distributed.world_size // group.size)[distributed.rank // group.size]


def run_model(
    module: Any, batch: Batch, device: torch.device, *, with_stats: bool, layer_hook: LayerHook | None
) -> ModelOutput:
    """Call ``module`` (the model or what an engine wrapped around it) with a batch of the host."""
    tokens, targets, positions, documents = (
        None if part is None else part.to(device, non_blocking=True) for part in batch
    )
    return module(
        tokens,
        targets_BS=targets,
        positions_BS=positions,
        documents_BS=documents,
        with_stats=with_stats,
        layer_hook=layer_hook,
    )
