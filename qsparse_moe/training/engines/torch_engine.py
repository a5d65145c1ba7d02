"""The plain PyTorch engine, which is the reference for the DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.model.init import WeightSource
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import LayerHook, Transformer
from qsparse_moe.moe.expert_group import ALONE, ExpertGroup, expert_group, global_shape
from qsparse_moe.moe.losses import StepLoad
from qsparse_moe.training.distributed.collectives import PatchTarget
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.fill import materialize_together
from qsparse_moe.training.engines.loss_scale import build_loss_scaler
from qsparse_moe.training.engines.optimizer import build_adamw, get_step, set_step, start_state
from qsparse_moe.training.engines.protocol import (
    COMPUTE_DTYPES,
    StateKind,
    equal_shard,
    num_micro_batches,
    replica_part,
    run_model,
)
from qsparse_moe.training.flat_range import FlatRange, shard_range


class TorchEngine:
    """An engine in which every rank holds all state except the experts of other ranks.

    Gradients are reduced one parameter at a time. In bf16 and fp16 the model's weights have that dtype, its gradients
    accumulate in fp32, and AdamW updates fp32 master weights.
    """

    name = "torch"
    collective_aliases: Sequence[PatchTarget] = ()

    def __init__(
        self, config: RunConfig, model: Transformer, distributed: Distributed, source: WeightSource | None = None
    ) -> None:
        self.distributed = distributed
        self.num_micro_batches = num_micro_batches(config, distributed.world_size)
        self._max_norm = config.training.gradient_clipping
        self.loss_scaler = build_loss_scaler(config, self.num_micro_batches)
        dtype = COMPUTE_DTYPES[config.training.precision]
        if source is not None:
            materialize_together(model, source, distributed, dtype)
        self.model = model.to(device=distributed.device, dtype=dtype)
        self._parameters = dict(self.model.named_parameters())
        self._step_load = self.model.step_load = StepLoad(distributed.all_reduce)
        self._masters = self._parameters
        if dtype != torch.float32:
            # Copied after the cast: the master weights must start from what the model computes with, as in DeepSpeed.
            self._masters = {name: nn.Parameter(p.detach().float()) for name, p in self._parameters.items()}
            accumulate_in_fp32(self._parameters.values())
        self._optimizer = build_adamw(self._masters.values(), config.training)
        # A checkpoint sets the moments before the first step, which would otherwise create them.
        for master in self._masters.values():
            start_state(self._optimizer, master)

    def forward(
        self, batch: Batch, *, with_stats: bool, with_logits: bool = True, layer_hook: LayerHook | None = None
    ) -> ModelOutput:
        """See ``Engine``."""
        return run_model(
            self.model,
            batch,
            self.distributed.device,
            with_stats=with_stats,
            with_logits=with_logits,
            layer_hook=layer_hook,
        )

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See ``Engine``."""
        if self.loss_scaler is not None:
            loss = loss * self.loss_scaler.factor
        (loss / self.num_micro_batches).backward()
        if is_last:
            average_gradients(self._parameters.values(), self.distributed)

    def gradient_shard(self, name: str) -> Tensor:
        """See ``Engine``."""
        gradient = self._parameters[name].grad
        assert gradient is not None, f"{name} has no gradient: it is read before the step's last backward"
        return equal_shard(gradient, self.distributed, expert_group(self._parameters[name]))

    def update(self, learning_rate: float) -> float:
        """See ``Engine``."""
        self._step_load.reset()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        factor = 1.0 if self.loss_scaler is None else self.loss_scaler.factor
        norm = clip_gradients(self._parameters.values(), self._max_norm, factor)
        # In other precisions the step is taken all the same: check_norm ends the run, and no checkpoint is written.
        overflow = self.loss_scaler is not None and not norm.isfinite()
        if not overflow:
            self._step()
        self._drop_gradient()
        if self.loss_scaler is not None:
            self.loss_scaler.update(overflow)
        return math.inf if overflow else float(norm)

    def skip(self) -> None:
        """See ``Engine``."""
        self._step_load.reset()
        self._drop_gradient()

    def _drop_gradient(self) -> None:
        # None and not zeros: frees the memory until the next backward pass.
        for parameter in self._parameters.values():
            parameter.grad = None

    def _step(self) -> None:
        for name, master in self._masters.items():
            master.grad = self._parameters[name].grad
        self._optimizer.step()
        for name, parameter in self._parameters.items():
            if self._masters is not self._parameters:
                self._masters[name].grad = None
                parameter.data.copy_(self._masters[name])

    def held_range(self, name: str) -> FlatRange:
        """See ``Engine``."""
        return shard_range(self._parameters[name], global_shape(self._parameters[name]).numel())

    def owned_range(self, name: str) -> FlatRange:
        """See ``Engine``."""
        return replica_part(self.held_range(name), self.distributed, expert_group(self._parameters[name]))

    def held(self, name: str, kind: StateKind) -> Tensor:
        """See ``Engine``."""
        master = self._masters[name]
        return (master.detach() if kind == "weight" else self._optimizer.state[master][kind]).view(-1)

    def set_held(self, name: str, kind: StateKind, values: Tensor) -> None:
        """See ``Engine``."""
        self.held(name, kind).copy_(values)

    @property
    def adam_step(self) -> int:
        """See ``Engine``."""
        return get_step(self._optimizer)

    @adam_step.setter
    def adam_step(self, step: int) -> None:
        set_step(self._optimizer, step)

    def shapes(self) -> dict[str, torch.Size]:
        """See ``Engine``."""
        return {name: global_shape(parameter) for name, parameter in self._parameters.items()}

    def describe(self) -> dict[str, Any]:
        """See ``Engine``."""
        return {"engine": self.name, "expert_parallel_size": self.model.runtime.expert_group.size}

    def close(self) -> None:
        """See ``Engine``."""
        self.model.step_load = None


def accumulate_in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """Make autograd store and accumulate the gradients of low-precision parameters in fp32."""
    for parameter in parameters:
        parameter.grad_dtype = torch.float32


def average_gradients(parameters: Iterable[nn.Parameter], distributed: Distributed) -> None:
    """Replace every gradient by its mean over the ranks; a parameter without a gradient counts as zeros.

    Sharded experts are reduced over their expert data-parallel group only, but also divided by the number of all ranks:
    the tokens of an expert came from its whole expert-parallel group, so that the sum covers the tokens of all ranks.
    """
    for parameter in parameters:
        if parameter.grad is None:
            # All ranks must call the collective, even if this rank's micro-batches did not use the parameter.
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        distributed.all_reduce(parameter.grad, group=expert_group(parameter).data_parallel).div_(distributed.world_size)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, factor: float = 1.0) -> Tensor:
    """Divide the gradients by ``factor``, then clip their global L2 norm to ``max_norm`` (0 disables clipping).

    Returns:
        The norm after the division and before clipping.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if factor != 1.0:
        torch._foreach_div_(gradients, factor)
    norm = _gradient_norm(parameters)
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of the whole model's gradient, where some parameters may be sharded over a group of ranks."""
    grads: dict[ExpertGroup, list[Tensor]] = {ALONE: []}
    for parameter in parameters:
        if parameter.grad is not None:
            grads.setdefault(expert_group(parameter), []).append(parameter.grad)
    norm = nn.utils.get_total_norm(grads.pop(ALONE))
    for group, shards in grads.items():
        # Over the expert-parallel group, which holds each expert exactly once.
        square = nn.utils.get_total_norm(shards).square()
        dist.all_reduce(square, group=group.members)
        norm = (norm.square() + square).sqrt()
    return norm
