"""DeepSpeed behind the interface of ``Engine``. Outside this package nothing depends on DeepSpeed's internals."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.init import WeightSource
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import LayerHook, Transformer
from qsparse_moe.moe.expert_group import expert_group
from qsparse_moe.moe.losses import StepLoad
from qsparse_moe.training.checkpoint.state import global_shapes
from qsparse_moe.training.distributed.collectives import PatchTarget
from qsparse_moe.training.distributed.ranks import Distributed, environment
from qsparse_moe.training.engines.deepspeed_config import deepspeed_config
from qsparse_moe.training.engines.deepspeed_experts import as_deepspeed_experts
from qsparse_moe.training.engines.deepspeed_partition import (
    fragment,
    fragment_gradient,
    fragment_range,
    set_zero3_state,
    zero3_range,
    zero3_state,
)
from qsparse_moe.training.engines.extension_builds import locked_builds
from qsparse_moe.training.engines.fill import materialize_together
from qsparse_moe.training.engines.loss_scale import build_loss_scaler
from qsparse_moe.training.engines.offload import check_alignment, remove_swap_files
from qsparse_moe.training.engines.optimizer import build_adamw, get_step, set_step, start_state
from qsparse_moe.training.engines.partition import partition_together
from qsparse_moe.training.engines.protocol import (
    COMPUTE_DTYPES,
    StateKind,
    equal_shard,
    num_micro_batches,
    replica_part,
    run_model,
)
from qsparse_moe.training.engines.torch_engine import accumulate_in_fp32, clip_gradients
from qsparse_moe.training.flat_range import FlatRange, shard_range


class DeepSpeedEngine:
    """ZeRO 0 to 3, in fp32, bf16 or fp16, with torch's AdamW as DeepSpeed's client optimizer."""

    def __init__(
        self, config: RunConfig, model: Transformer, distributed: Distributed, source: WeightSource | None = None
    ) -> None:
        self.distributed = distributed
        self.num_micro_batches = num_micro_batches(config, distributed.world_size)
        self.stage = config.training.deepspeed.zero_stage
        self.name = f"deepspeed ZeRO-{self.stage}"
        self.model = model
        self._step_load = self.model.step_load = StepLoad(distributed.all_reduce)
        self._max_norm = config.training.gradient_clipping
        self.loss_scaler = build_loss_scaler(config, self.num_micro_batches)
        self._config = config
        # Before deepspeed.initialize: ZeRO-3 empties the parameters that it partitions.
        self._shapes = global_shapes(model)
        # A partition of sharded experts has the size of their global tensor divided by all ranks: the shard is 1/P of
        # it and is partitioned over the expert data-parallel group, which has 1/P of the ranks.
        largest = max(shape.numel() for shape in self._shapes.values())
        self._settings = deepspeed_config(config, distributed.world_size, largest_parameter=largest)
        self._adam = build_adamw(model.parameters(), config.training)
        with (
            _deepspeed_setup(),
            _fp16_on_any_cpu(),
            as_deepspeed_experts(model, self._adam, model.runtime.expert_group),
        ):
            if source is not None:
                self._fill(source)
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._adam, config=self._settings)
        # DeepSpeed binds these two at start-up, so patching torch.distributed alone would miss their time.
        names = ("all_gather_function", "reduce_scatter_function")
        self.collective_aliases: Sequence[PatchTarget] = [(comm.cdb, name) for name in names]
        self._parameters = dict(model.named_parameters())
        if self.stage == 0:
            accumulate_in_fp32(self._parameters.values())
        try:
            self._check_swapping()
        except ConfigError:
            # No caller has this engine yet, so close() will not be called.
            remove_swap_files(config, distributed.rank)
            raise
        self._start_optimizer_states()

    def _fill(self, source: WeightSource) -> None:
        """Give the model's parameters memory and weights: what this rank keeps, in the dtype that it keeps."""
        dtype = COMPUTE_DTYPES[self._config.training.precision]
        if self.stage == 3:
            partition_together(self.model, source, self.distributed, dtype, self._settings)
        else:
            materialize_together(self.model, source, self.distributed, dtype)

    def forward(
        self, batch: Batch, *, with_stats: bool, with_logits: bool = True, layer_hook: LayerHook | None = None
    ) -> ModelOutput:
        """See ``Engine``."""
        return run_model(
            self._engine,
            batch,
            self.distributed.device,
            with_stats=with_stats,
            with_logits=with_logits,
            layer_hook=layer_hook,
        )

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See ``Engine``. DeepSpeed divides by the number of micro-batches and reduces as its ZeRO stage requires."""
        if self.loss_scaler is not None:
            loss = self._scaled(loss, self.loss_scaler.factor)
        self._engine.backward(loss)
        if not is_last:
            # It counts micro-batches in step(); only the call in update() reaches the boundary and steps.
            self._engine.step()

    def gradient_shard(self, name: str) -> Tensor:
        """See ``Engine``."""
        parameter = self._parameters[name]
        if self.stage == 0:
            assert parameter.grad is not None, f"{name} has no gradient: it is read before the step's last backward"
            return equal_shard(parameter.grad, self.distributed, expert_group(parameter))
        if self.stage == 3:
            return safe_get_local_grad(parameter)
        return fragment_gradient(parameter)

    def update(self, learning_rate: float) -> float:
        """See ``Engine``."""
        # The balance loss of the next step must not include the loads of this one.
        self._step_load.reset()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._step()
        if self.loss_scaler is None:
            return float(norm)
        # DeepSpeed has decided it, over all ranks, and has skipped the step.
        overflow = bool(self._engine.optimizer.overflow)
        self.loss_scaler.update(overflow)
        if overflow:
            self._drop_gradient()
        return math.inf if overflow else float(norm)

    def skip(self) -> None:
        """See ``Engine``. The optimizers of ZeRO drop the gradient as after an overflow in fp16, in any precision."""
        self._step_load.reset()
        optimizer = self._engine.optimizer
        if self.stage == 3:
            changes: dict[str, Any] = {"_overflow_check_and_loss_scale_update": self._declare_overflow}
        elif hasattr(optimizer, "check_grad_overflow"):
            changes = {"check_grad_overflow": True, "check_overflow": self._declare_overflow}
        else:
            # AdamW and its wrappers for bf16 and fp16, which keep gradients of their own.
            changes = {"step": optimizer.zero_grad}
        # Through DeepSpeed's step and not around it: it counts the micro-batches and ends the step's timers.
        with mock.patch.multiple(optimizer, **changes):
            self._engine.step()
        self._drop_gradient()

    def _declare_overflow(self, **_: Any) -> None:
        self._engine.optimizer.overflow = True

    def _step(self) -> Tensor | float:
        """Take DeepSpeed's optimizer step and return the norm of the gradient before clipping."""
        if self.stage == 0:
            # Here and not in DeepSpeed: at ZeRO-0 in fp32 it clips but does not return the norm.
            factor = 1.0 if self.loss_scaler is None else self.loss_scaler.factor
            norm = clip_gradients(self._parameters.values(), self._max_norm, factor)
            self._engine.step()
            return norm
        self._engine.step()
        return self._engine.get_global_grad_norm()

    def _drop_gradient(self) -> None:
        """Clear the gradient of a skipped step: with offload, ZeRO-1 and 2 keep it and would skip all later steps."""
        sums = getattr(self._engine.optimizer, "averaged_gradients", {})
        for group in sums:
            sums[group] = None

    def _scaled(self, loss: Tensor, factor: float) -> Tensor:
        """Return the loss times the factor at ZeRO-0; above it set DeepSpeed's loss scale, which it applies itself."""
        if self.stage == 0:
            return loss * factor
        self._engine.optimizer.loss_scale = factor
        return loss

    def held_range(self, name: str) -> FlatRange:
        """See ``Engine``."""
        parameter = self._parameters[name]
        shard = shard_range(parameter, self._shapes[name].numel())
        if self.stage == 0:
            return shard
        if self.stage == 3:
            return zero3_range(self._engine.optimizer, parameter, len(shard)).moved(shard.start)
        return fragment_range(parameter).moved(shard.start)

    def owned_range(self, name: str) -> FlatRange:
        """See ``Engine``."""
        if self.stage == 0:
            return replica_part(self.held_range(name), self.distributed, expert_group(self._parameters[name]))
        return self.held_range(name)

    def held(self, name: str, kind: StateKind) -> Tensor:
        """See ``Engine``."""
        parameter: Any = self._parameters[name]
        if self.stage == 0:
            return self._replicated(parameter, kind).view(-1)
        if self.stage == 3:
            return zero3_state(self._engine.optimizer, parameter, kind)[: len(self.held_range(name))]
        return fragment(parameter, kind)

    def set_held(self, name: str, kind: StateKind, values: Tensor) -> None:
        """See ``Engine``. It sets the fp32 master only: the model was built with the weight used in computation."""
        if self.stage == 3:
            set_zero3_state(self._engine.optimizer, self._parameters[name], kind, values)
        else:
            self.held(name, kind).copy_(values)

    @property
    def adam_step(self) -> int:
        """See ``Engine``."""
        return get_step(self._adam)

    @adam_step.setter
    def adam_step(self, step: int) -> None:
        set_step(self._adam, step)

    def shapes(self) -> dict[str, torch.Size]:
        """See ``Engine``."""
        return self._shapes

    def describe(self) -> dict[str, Any]:
        """See ``Engine``."""
        size = self.model.runtime.expert_group.size
        return {"engine": self.name, "expert_parallel_size": size, "deepspeed": self._settings}

    def close(self) -> None:
        """See ``Engine``."""
        self.model.step_load = None
        self._engine.destroy()
        remove_swap_files(self._config, self.distributed.rank)

    def _check_swapping(self) -> None:
        """Raise ConfigError if NVMe offload would read a gradient back to a wrong offset; see ``check_alignment``."""
        zero = self._engine.optimizer
        swapper = getattr(zero, "optimizer_swapper", None)
        if swapper is None:
            return
        # Each entry is (sub-group, offset, number of elements); small sub-groups stay in memory.
        partitions = {name: zero.grad_position[zero.get_param_id(p)] for name, p in self._parameters.items()}
        swapped = {name: part[1:] for name, part in partitions.items() if zero._swappable_optimizer_subgroup(part[0])}
        smallest = swapper.min_aio_bytes // swapper.swap_element_size
        check_alignment(swapped, alignment=swapper.numel_alignment, smallest=smallest)

    def _start_optimizer_states(self) -> None:
        """Create the AdamW state of every flat parameter and link the model's parameters to their parts of it.

        DeepSpeed does both in the first step. There ZeRO-1 and 2 link all groups as soon as the first one has a state,
        so that the moments of the second group (the norms) could never be read. At ZeRO-0 in bf16 DeepSpeed also takes
        a step when it is built, and Adam's counter would include it.
        """
        for index, flat in enumerate(self._flat_parameters()):
            with self._swapped_in(index):
                start_state(self._adam, flat)
        # The wrapper of ZeRO-3 and plain AdamW lack this method.
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _flat_parameters(self) -> Iterator[Tensor]:
        """Yield the tensors that AdamW updates: flat partitions, or at ZeRO-0 the parameters or their fp32 copies."""
        if self.stage == 3:
            yield from self._engine.optimizer.fp32_partitioned_groups_flat
            return
        for group in self._adam.param_groups:
            yield from group["params"]

    @contextlib.contextmanager
    def _swapped_in(self, index: int) -> Iterator[None]:
        """Hold the ``index``-th flat parameter and its state in memory under NVMe offload; write them back on exit."""
        zero = self._engine.optimizer
        is_swapped = self.stage == 3 and zero._swappable_optimizer_subgroup(index)
        if is_swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        yield
        if is_swapped:
            zero._optimizer_states_and_gradient_swap_out(index)

    def _replicated(self, parameter: nn.Parameter, kind: StateKind) -> Tensor:
        """Return a tensor of ZeRO-0, where every rank of a data-parallel group holds all of it."""
        master = self._masters().get(parameter, parameter)
        return master.detach() if kind == "weight" else self._adam.state[master][kind]

    def _masters(self) -> dict[Tensor, Tensor]:
        """Return the fp32 copy of every parameter at ZeRO-0 in bf16 and fp16; empty in fp32."""
        wrapper = self._engine.optimizer
        if wrapper is self._adam:
            return {}
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


@contextlib.contextmanager
def _deepspeed_setup() -> Iterator[None]:
    """Keep DeepSpeed's initialization from compiling unused operators and from writing to standard output.

    Operators that it does need are compiled under a lock that ends with its holder; see ``locked_builds``.
    """
    # The shared-memory operator serves tensor-parallel inference only, and compiling it takes a compiler and half a
    # minute. Without this assignment DeepSpeed fills the dictionary by starting compilers to see what could be built.
    deepspeed.ops.__compatible_ops__ = {}
    for handler in deepspeed.utils.logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr
    # torch 2.13 renamed collectives that DeepSpeed 0.19.8 calls by their old names in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # DeepSpeed imports its Muon optimizer, which imports torch's compiler: 1.0 s of CPU time per rank, unused here.
    with environment(TORCHDYNAMO_DISABLE="1"), locked_builds(), contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _fp16_on_any_cpu() -> Iterator[None]:
    """Let DeepSpeed accept fp16 on every CPU: its check asks oneDNN for fast fp16, but torch computes it anywhere."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        with mock.patch.object(accelerator, "is_fp16_supported", lambda: True):
            yield
    else:
        yield
