"""This rank's partition of a parameter under DeepSpeed's ZeRO: its range, its fp32 state, and its gradient.

ZeRO-1 and 2 cut the concatenation of all parameters of a group, so that a rank has a fragment of a parameter or none.
ZeRO-3 cuts every parameter into partitions of the same size, of which the last are zero-padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsparse_moe.training.engines.protocol import StateKind
from qsparse_moe.training.flat_range import FlatRange


def fragment_range(parameter: Any) -> FlatRange:
    """Return the range of this rank's fragment of a parameter under ZeRO-1 and 2."""
    mapping = parameter._hp_mapping
    if mapping is None:  # The optimizer partition of this rank contains no element of the parameter.
        return FlatRange(0, 0)
    owned = mapping.lp_fragment_address
    return FlatRange(owned.start, owned.start + owned.numel)


def fragment(parameter: Any, kind: StateKind) -> Tensor:
    """Return this rank's fragment of a parameter's fp32 state under ZeRO-1 and 2, not a copy."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return torch.zeros(0)
    return mapping.get_hp_fragment(None if kind == "weight" else kind).detach()


def fragment_gradient(parameter: Any) -> Tensor:
    """Return this rank's fragment of a gradient under ZeRO-1 and 2, as ``safe_get_full_grad`` sums it over the ranks.

    DeepSpeed's function for local gradients supports ZeRO-3 only, and the one for full gradients would communicate as
    many elements as the model has.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return torch.zeros(0)
    part = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    owned = mapping.lp_fragment_address
    # ZeRO-1 in bf16 keeps the full reduced gradient on every rank.
    return part.narrow(0, owned.start, owned.numel) if part.numel() == parameter.numel() else part


def zero3_range(zero: Any, parameter: Any, num_elements: int) -> FlatRange:
    """Return the range of this rank's partition under ZeRO-3, without its padding."""
    _, _, size = zero.grad_position[zero.get_param_id(parameter)]
    return FlatRange(0, num_elements).part_of_size(size, parameter.ds_zero_partition_rank)


def zero3_state(zero: Any, parameter: Any, kind: StateKind) -> Tensor:
    """Return this rank's padded partition of a parameter's fp32 state under ZeRO-3.

    With NVMe offload it is read from its file, and the result is valid until the next call.
    """
    key = None if kind == "weight" else kind
    part, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
    return part.detach()


def set_zero3_state(zero: Any, parameter: Any, kind: StateKind, values: Tensor) -> None:
    """Set this rank's partition under ZeRO-3 and clear its padding; if it is offloaded, write it back to its file.

    DeepSpeed's own setter takes the size from the weights used in computation, which are empty while they are swapped
    out.
    """
    key = None if kind == "weight" else kind
    part, group = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    part = part.detach()
    part[: len(values)].copy_(values)
    part[len(values) :].zero_()
    if zero._swappable_optimizer_subgroup(group):
        zero._optimizer_states_and_gradient_swap_out(group)
