"""Activation checkpointing: what of a layer the backward computes again instead of keeping it.

Non-reentrant only: the other kind drops the gradient of a loss that is returned inside a structure. What is computed
again starts from the same bits, so router and sparse sites choose the same; a test compares, ties included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qsparse_moe.config.schema import RECOMPUTE, Recompute

T = TypeVar("T")

_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_PRODUCTS = ("mm", "bmm", "addmm", "_grouped_mm", *_ATTENTION)


def run_part(chosen: Recompute, part: Recompute, function: Callable[..., T], *args: Any) -> T:
    """``function(*args)``, where ``chosen`` says that this ``part`` is computed again in the backward.

    Args:
        chosen: ``training.activation_checkpointing``.
        part: what ``function`` is of a layer: ``full`` for all of it, ``attention`` or ``feed_forward``.
        function: returns tensors, or tuples and dicts of them.
        args: its arguments.
    """
    assert chosen in RECOMPUTE, chosen
    keeps_products = chosen == "selective" and part == "full"
    if not torch.is_grad_enabled() or not (chosen == part or keeps_products):
        return function(*args)
    if not keeps_products:
        return checkpoint(function, *args, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _kept() else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _kept() -> frozenset[Any]:
    """Operators whose results are kept: they take nearly all the time and few of the bytes of a layer."""
    found = {getattr(torch.ops.aten, name).default for name in _PRODUCTS if hasattr(torch.ops.aten, name)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found.add(torch.ops.mkldnn._linear_pointwise.default)
    return frozenset(found)
