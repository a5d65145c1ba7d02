"""Activation checkpointing: the parts of a layer that the backward recomputes instead of storing their activations.

Only non-reentrant checkpointing is used: the reentrant kind drops the gradient of a loss that is returned inside a
tuple. A recomputation starts from the same bits, so router and sparse sites select the same experts and features. A
test compares both, including ties.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qsparse_moe.config.schema import RECOMPUTE, Recompute
from qsparse_moe.model.document_attention import find_varlen_attn

T = TypeVar("T")

# The implementations of scaled_dot_product_attention, of which PyTorch chooses one per device and shape.
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
# Under the setting ``selective`` the results of these operators are stored and everything else is recomputed.
# By name: they exist only once they have been compiled and loaded.
_OWN_PRODUCTS = ("qsparse_moe::expert_products",)
_PRODUCTS = ("mm", "bmm", "addmm", "_grouped_mm", *_ATTENTION)


def run_part(chosen: Recompute, part: Recompute, function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)``, recomputed in the backward if the setting covers this ``part`` of a layer.

    Args:
        chosen: ``training.activation_checkpointing``.
        part: the part of the layer that ``function`` computes: ``full``, ``attention``, or ``feed_forward``.
        function: returns tensors, or tuples and dicts of them.
        args: its arguments.
    """
    assert chosen in RECOMPUTE, chosen
    # "selective" wraps whole layers and lets the policy below decide operator by operator.
    keeps_products = chosen == "selective" and part == "full"
    # Without gradients there is no backward that could recompute.
    if not torch.is_grad_enabled() or not (chosen == part or keeps_products):
        return function(*args)
    if not keeps_products:
        return checkpoint(function, *args, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    stored = operator in _stored() or operator.name() in _OWN_PRODUCTS
    return CheckpointPolicy.MUST_SAVE if stored else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _stored() -> frozenset[Any]:
    """Return the operators whose results are stored: they take most of the time and few of the bytes of a layer."""
    # Not every version and build of PyTorch has all of these operators.
    found = {getattr(torch.ops.aten, name).default for name in _PRODUCTS if hasattr(torch.ops.aten, name)}
    # The product of kernels/onednn.py, which PyTorch builds without oneDNN lack.
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found.add(torch.ops.mkldnn._linear_pointwise.default)
    if find_varlen_attn() is not None:
        found.add(torch.ops.torch_attn._varlen_attn.default)
    return frozenset(found)
