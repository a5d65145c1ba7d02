"""Marks for DeepSpeed on experts that are sharded over ranks, so that it never sums gradients of different experts."""

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
    """Mark the experts of ``model`` and their process groups while ``deepspeed.initialize`` runs.

    DeepSpeed then reduces the experts' gradients over their expert data-parallel group and divides by the number of all
    ranks, partitions their optimizer states over that group, and counts every expert once in the gradient norm.
    """
    if group.size == 1:
        yield
        return
    name = f"ep_size_{group.size}"
    for parameter in model.parameters():
        if expert_group(parameter) is group:
            _tag(parameter, name)
    # DeepSpeed splits experts off from each group under the group's name, so the groups need different names.
    for index, param_group in enumerate(optimizer.param_groups):
        param_group["name"] = f"dense-{index}"
    optimizer.param_groups = split_params_into_different_moe_groups_for_optimizer(optimizer.param_groups)
    model.add_module("as_deepspeed_experts", _ExpertMarker(name, group, model.config.moe.num_experts))
    try:
        yield
    finally:
        # The marker must not appear among the modules of the model, whose state-dict keys are public.
        del model.as_deepspeed_experts


def _tag(parameter: Any, name: str) -> None:
    parameter.allreduce = False
    parameter.group_name = name
    # ZeRO-3 reads these instead, to partition the parameter over its expert data-parallel group.
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = name


class _ExpertMarker(AutoEPMoELayer):
    """A module that is never called. DeepSpeed enables its expert handling only if it finds one of its own classes.

    It has two such classes, and ZeRO-3 accepts only this one.
    """

    def __init__(self, name: str, group: ExpertGroup, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self._name, self._group = name, group

    def set_deepspeed_parallelism(self, *unused: Any, **also_unused: Any) -> None:
        """Register the model's process groups; DeepSpeed calls this method before it looks the groups up."""
        groups._get_expert_parallel_group_dict()[self._name] = self._group.members
        groups._get_expert_data_parallel_group_dict()[self._name] = self._group.data_parallel
