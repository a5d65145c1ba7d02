"""What DeepSpeed has to see of experts that are spread over ranks, so that it never adds different experts up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn

from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.expert_group import ExpertGroup, expert_group


@contextlib.contextmanager
def as_deepspeed_experts(model: Transformer, optimizer: torch.optim.Optimizer, group: ExpertGroup) -> Iterator[None]:
    """While DeepSpeed takes over ``model`` and ``optimizer``: show it the experts and their groups of ranks.

    Their gradients are then added over the ranks that hold the same experts and divided by the number of all ranks,
    their optimizer states are cut over the former, and the gradient's norm counts each of them once.
    """
    if group.size == 1:
        yield
        return
    name = f"ep_size_{group.size}"
    for parameter in model.parameters():
        if expert_group(parameter) is group:
            _tag(parameter, name)
    # The names only keep its new groups apart.
    for index, param_group in enumerate(optimizer.param_groups):
        param_group["name"] = f"dense-{index}"
    optimizer.param_groups = split_params_into_different_moe_groups_for_optimizer(optimizer.param_groups)
    model.add_module("as_deepspeed_experts", _SpreadExperts(name, group, model.config.moe.num_experts))
    try:
        yield
    finally:
        del model.as_deepspeed_experts


def _tag(parameter: Any, name: str) -> None:
    parameter.allreduce = False
    parameter.group_name = name
    # ZeRO-3 reads these instead, to cut the parameter over its replicas.
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = name


class _SpreadExperts(AutoEPMoELayer):
    """Takes part in no forward: DeepSpeed believes in experts only where it finds a module of one of its own classes.

    Of the two there are ZeRO-3 accepts this one.
    """

    def __init__(self, name: str, group: ExpertGroup, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self._name, self._group = name, group

    def set_deepspeed_parallelism(self, *unused: Any, **also_unused: Any) -> None:
        """Called while the engine is built, before it asks for the groups: it gets those that the model uses."""
        groups._get_expert_parallel_group_dict()[self._name] = self._group.members
        groups._get_expert_data_parallel_group_dict()[self._name] = self._group.data_parallel
