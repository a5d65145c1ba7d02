"""The interface of an engine, as training steps and checkpoints use it."""

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
from qsparse_moe.training.flat_range import FlatRange

StateKind = Literal["weight", "exp_avg", "exp_avg_sq"]
STATE_KINDS: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
"""The tensors that training keeps for every parameter: the fp32 weight and Adam's two moments."""

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of the weights used in computation and of activations, by ``training.precision``."""


class Engine(Protocol):
    """A model with its optimizer, replicated or sharded over the ranks. All ranks must call every method together."""

    name: str
    model: Transformer
    distributed: Distributed
    num_micro_batches: int
    """Number of micro-batches per rank and step."""
    collective_aliases: Sequence[PatchTarget]
    """Attributes under which a library stores functions of torch.distributed; ``timed_collectives`` patches them."""
    loss_scaler: LossScaler | None
    """The scaler of the loss in fp16; None in other precisions."""

    def forward(
        self, batch: Batch, *, with_stats: bool, with_logits: bool = True, layer_hook: LayerHook | None = None
    ) -> ModelOutput:
        """Return the model's output for a batch in host memory; gradients are recorded unless disabled.

        See ``Transformer.forward``.
        """

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate this micro-batch's gradient, divided by ``num_micro_batches``.

        After the last micro-batch of a step the gradients are reduced over the ranks, unless the engine does so in
        ``update``.
        """

    def gradient_shard(self, name: str) -> Tensor:
        """Return this rank's shard of the gradient of the parameter ``name``, before clipping: flat, on any device.

        Call it between the last backward of a step and ``update``, and do not modify the result. The gradient is the
        mean over the global batch. Over all ranks the shards contain each of its elements exactly once; any further
        elements are zero padding.
        """

    def update(self, learning_rate: float) -> float:
        """Clip the gradient, take the optimizer step, and clear the gradient; in fp16 also adapt the loss scale.

        Returns:
            The norm of the global batch's gradient before clipping. In fp16 it is infinite if the scaled gradient
            overflowed and the step was skipped. In other precisions a norm that is not finite means that the weights
            may have been overwritten.
        """

    def skip(self) -> None:
        """Take the place of ``update`` in a step that must not change anything: drop the gradient.

        Weights, moments, Adam's step counter, and the loss scale keep their values.
        """

    def held_range(self, name: str) -> FlatRange:
        """Return the range of the flattened global parameter ``name`` whose fp32 state this rank holds."""

    def owned_range(self, name: str) -> FlatRange:
        """Return the part of ``held_range`` that this rank saves: the ranks' parts contain each element once."""

    def held(self, name: str, kind: StateKind) -> Tensor:
        """Return the fp32 values of ``held_range``: flat, on any device, and valid until the next call or step.

        No rank communicates. The result is the engine's own memory, except with NVMe offload; do not modify it.
        """

    def set_held(self, name: str, kind: StateKind, values: Tensor) -> None:
        """Set the values of ``held_range``, flat. A weight must equal the one that the model was built with."""

    @property
    def adam_step(self) -> int:
        """Adam's step counter."""

    @adam_step.setter
    def adam_step(self, step: int) -> None: ...

    def shapes(self) -> dict[str, torch.Size]:
        """Return the global shape of every parameter by its name in the state dict; a tied one occurs once."""

    def describe(self) -> dict[str, Any]:
        """Return the entries that the manifest records for this engine; JSON-able."""

    def close(self) -> None:
        """Release hooks, buffers, and swap files."""


def num_micro_batches(config: RunConfig, world_size: int) -> int:
    """Return the number of micro-batches per rank and step."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * world_size)


def replica_part(held: FlatRange, distributed: Distributed, group: ExpertGroup = ALONE) -> FlatRange:
    """Return this rank's part of a range of which every replica holds all; see ``equal_shard`` for the replicas."""
    return held.part(distributed.rank // group.size, distributed.world_size // group.size)


def equal_shard(value: Tensor, distributed: Distributed, group: ExpertGroup = ALONE) -> Tensor:
    """Return this rank's flat shard, a view, of a replicated tensor; the sizes of the shards differ by at most one.

    The replicas are all ranks, or the expert data-parallel group of this rank if the tensor is sharded over ``group``.
    """
    return value.flatten().tensor_split(distributed.world_size // group.size)[distributed.rank // group.size]


def run_model(
    module: Any,
    batch: Batch,
    device: torch.device,
    *,
    with_stats: bool,
    layer_hook: LayerHook | None,
    with_logits: bool = True,
) -> ModelOutput:
    """Call ``module``, the model or the engine's wrapper around it, with a batch in host memory."""
    # Tokens are copied while the previous micro-batch still computes, if the host memory is pinned. The documents stay
    # in host memory, where the model reads how long they are without waiting for the device.
    tokens, targets, positions, loss_weight = (
        None if part is None else part.to(device, non_blocking=True)
        for part in (batch.tokens_BS, batch.targets_BS, batch.positions_BS, batch.loss_weight)
    )
    # Through __call__ and not forward: DeepSpeed's wrapper and its ZeRO-3 hooks act on module calls only.
    return module(
        tokens,
        targets_BS=targets,
        positions_BS=positions,
        documents_BS=batch.documents_BS,
        loss_weight=loss_weight,
        with_stats=with_stats,
        with_logits=with_logits,
        layer_hook=layer_hook,
    )
