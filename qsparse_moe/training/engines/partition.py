"""Weights for a model on the meta device under ZeRO-3, of which each rank keeps its partition of every parameter."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from qsparse_moe.model.init import WeightSource, fill_range, use_memory
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.expert_group import expert_group
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.flat_range import FlatRange


def partition_together(
    model: Transformer, source: WeightSource, distributed: Distributed, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """Make every parameter a partition of DeepSpeed's, filled with its weights. All ranks must call it together.

    Args:
        model: a model on the meta device.
        source: the weights, of which this rank reads its partitions.
        distributed: the ranks.
        dtype: the dtype of the partitions.
        settings: DeepSpeed's configuration, which says where they are kept.
    """
    # Before DeepSpeed reads its settings, whose batch sizes it compares with the number of ranks.
    deepspeed.init_distributed()
    init = _FilledInit(config_dict_or_path=settings, dtype=dtype)

    def fill() -> None:
        largest = max(parameter.numel() for parameter in model.parameters())
        # All parameters in turn: memory that is allocated and freed for each would leave gaps between the partitions.
        whole = torch.empty(largest, dtype=dtype, device=distributed.device)
        for name, parameter in model.named_parameters():
            use_memory(parameter, whole[: parameter.numel()].view(parameter.shape))
            _choose_group(parameter)
            part = partition_range(parameter, distributed)
            out = parameter.detach().view(-1)[part.start : part.stop]
            fill_range(source, name, parameter, out, part.start)
            init.partition(parameter)

    # One rank may meet a damaged tensor that the others do not read, and must not leave them waiting.
    distributed.on_every_rank(fill)


def partition_range(parameter: nn.Parameter, distributed: Distributed) -> FlatRange:
    """Return the range of this rank's flattened shard of ``parameter`` that ZeRO-3 makes its partition."""
    group = expert_group(parameter)
    size = -(-parameter.numel() // (distributed.world_size // group.size))
    return FlatRange(0, parameter.numel()).part_of_size(size, distributed.rank // group.size)


def _choose_group(parameter: Any) -> None:
    """Let DeepSpeed partition sharded experts over their expert data-parallel group."""
    group = expert_group(parameter)
    if group.size > 1:
        parameter.ds_zero_partition_process_group = group.data_parallel


class _FilledInit(deepspeed.zero.Init):
    """DeepSpeed's conversion of parameters into partitions, without its broadcast of each of them from rank 0."""

    def partition(self, parameter: nn.Parameter) -> None:
        """Keep this rank's partition of the parameter and free the rest."""
        self._convert_to_zero_parameters([parameter])

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()
