"""Weights of a model that is measured and not trained, divided over the ranks."""

from __future__ import annotations

import logging
import mmap
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.model.init import WeightSource, fill_range, materialize, use_memory
from qsparse_moe.model.sharded import ShardedParameter, shard_module
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.flat_range import FlatRange

logger = logging.getLogger(__name__)
SMALLEST = 100_000
"""Parameters with fewer elements stay whole on every rank, as under ZeRO-3: gathering them costs more than they do."""


def choose_sharding(requested: bool | None, config: RunConfig, distributed: Distributed | None) -> Distributed | None:
    """Return the ranks over which the weights are divided; None if every rank holds the whole model.

    Args:
        requested: whether to divide them; None: as in training, that is under ZeRO-3 and with expert parallelism.
        config: the run of the model.
        distributed: the ranks; None is this process alone.
    """
    if distributed is None or distributed.world_size == 1:
        return None
    training = config.training
    was_sharded = training.engine == "deepspeed" and training.deepspeed.zero_stage == 3
    chosen = was_sharded or training.expert_parallel_size > 1 if requested is None else requested
    logger.info("weights: %s", f"divided over {distributed.world_size} ranks" if chosen else "whole on every rank")
    return distributed if chosen else None


def fill_model(
    model: nn.Module,
    source: WeightSource,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    distributed: Distributed | None,
) -> None:
    """Give a model its weights, as ``materialize`` does, or as ``shard_weights`` does where there are ranks."""
    if distributed is None:
        materialize(model, source, device=device, dtype=dtype)
    else:
        shard_weights(model, source, distributed, dtype)


def shard_weights(model: nn.Module, source: WeightSource, distributed: Distributed, dtype: torch.dtype) -> None:
    """Divide the weights of a model on the meta device over the ranks, which must call it together.

    Each rank reads its range of every parameter from ``source``, and nothing else.
    """
    sharded: dict[nn.Parameter, ShardedParameter] = {}
    gather = AllGather(distributed.world_size)

    def fill() -> None:
        for name, parameter in model.named_parameters():
            if parameter.numel() < SMALLEST:
                use_memory(parameter, torch.empty(parameter.shape, device=distributed.device, dtype=dtype))
                fill_range(source, name, parameter, parameter.detach().view(-1), 0)
            else:
                sharded[parameter] = _shard(name, parameter, source, distributed, dtype, gather)

    # One rank may meet a damaged tensor that the others do not read, and must not leave them waiting.
    distributed.on_every_rank(fill)
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        shard_module(module, {name: sharded[parameter] for name, parameter in own.items() if parameter in sharded})


def _shard(
    name: str,
    parameter: nn.Parameter,
    source: WeightSource,
    distributed: Distributed,
    dtype: torch.dtype,
    gather: AllGather,
) -> ShardedParameter:
    size = -(-parameter.numel() // distributed.world_size)
    part = FlatRange(0, parameter.numel()).part_of_size(size, distributed.rank)
    shard = torch.zeros(size, dtype=dtype, device=distributed.device)
    source.fill(name, part.start, shard[: len(part)])
    return ShardedParameter(shard, parameter.shape, gather)


class AllGather:
    """Gathers shards over all ranks; see ``Gather``. On a CPU it keeps memory for the next tensor of the same size."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def __call__(self, shard: Tensor) -> Tensor:
        """Return the shards of all ranks, one after the other. All ranks must call it together."""
        size = self._world_size * len(shard)
        free = self._free[size]
        whole = free.pop() if free else _new_memory(size, shard)
        # torch 2.13 renamed the function, and warns of the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        # As bytes, which every backend of torch.distributed moves, whatever the dtype.
        gather(whole.view(torch.uint8), shard.view(torch.uint8))
        return whole

    def free(self, whole: Tensor) -> None:
        """Use the memory of a gathered tensor again. The allocator of CUDA does so by itself."""
        if whole.device.type == "cpu":
            self._free[len(whole)].append(whole)


def _new_memory(size: int, like: Tensor) -> Tensor:
    if like.device.type != "cpu":
        return torch.empty(size, dtype=like.dtype, device=like.device)
    # Mapped by itself, and returned to the system with the tensor: between freed weights of a model of 0.4 B parameters
    # glibc kept up to 0.5 GB of gaps (docs/lab-log.md, 29 November).
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, size * like.element_size(), flags), dtype=like.dtype)
