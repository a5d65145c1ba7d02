"""The output head, and the loss of its logits without a tensor of all of them. T tokens, D width, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.kernels.onednn import Linear, linear

# The convention of torch.nn.functional.cross_entropy and of transformers.
IGNORED_LABEL = -100
# Fewer logits than these are computed at once, because smaller products are slower: on two CPU threads 4096 tokens and
# 1056 ids (width 128) took 1.25 times as long in parts, 1024 and 8192 (512) 1.00 in fp32 and 0.91 in bf16, and 2048 and
# 32000 (256) 0.93.
_FEW_LOGITS = 2**23
# A part holds its logits in fp32 and one temporary of their size, and those in bf16: 2 to 3 bytes per logit of all.
_PARTS = 4


class OutputHead(Linear):
    """The projection to the vocabulary."""

    def forward(self, x: Tensor, targets_T: Tensor | None = None) -> Tensor:
        """Return the logits ``(*, V)`` of ``x`` ``(*, D)``; with targets the sum of their losses, in at least fp32.

        Args:
            x: the normed output of the last layer; ``(T, D)`` with targets.
            targets_T: the token that each position is trained to predict; -100 is ignored.
        """
        if targets_T is None:
            return super().forward(x)
        part = part_size(len(targets_T), self.out_features, x.dtype)
        if part >= len(targets_T):
            return summed_loss(super().forward(x), targets_T)
        total: Tensor = _LossInParts.apply(x, self.weight, targets_T, part)
        return total


def part_size(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Return the number of tokens whose logits are computed at once for the loss."""
    # The gradients of a part are products with unscaled gradients of logits. Their sums over tokens fit into fp32 and
    # bf16; fp16 needs the scale of the loss, which only the backward pass knows.
    if num_tokens * vocabulary < _FEW_LOGITS or dtype == torch.float16:
        return num_tokens
    return -(-num_tokens // _PARTS)


def summed_loss(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the sum of the losses over the targets that are not ignored, in nats and at least fp32."""
    # The softmax sums over the whole vocabulary, for which the 8 bits of bf16 are too few.
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(wide_TV, targets_T, ignore_index=IGNORED_LABEL, reduction="sum")


def mean_loss(total: Tensor, targets: Tensor) -> Tensor:
    """Return ``total`` divided by the number of targets that are not ignored; 0 if all are ignored."""
    # PyTorch's own mean would be 0 / 0 for a micro-batch in which every target is ignored.
    return total / (targets != IGNORED_LABEL).sum().clamp(min=1)


class _LossInParts(torch.autograd.Function):
    """The loss and its gradients part by part: the logits of one part exist at a time, in the forward pass only.

    The gradients of the sum are computed together with it, so no product is computed twice (as in Liger-Kernel's fused
    linear cross-entropy, arXiv 2410.10989); the backward pass multiplies them with the gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, part: int) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        # Added in at least fp32: in bf16, later parts would be rounded away.
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        total = torch.zeros((), device=x_TD.device, dtype=wide)
        for begin in range(0, len(targets_T), part):
            x_PD, targets_P = x_TD[begin : begin + part], targets_T[begin : begin + part]
            # The logits become the gradient of their loss in place.
            wide_PV = linear(x_PD, weight_VD).to(wide)
            total += _loss_and_gradient(wide_PV, targets_P, with_gradient=needs_x or needs_weight)
            grad_PV = wide_PV.to(x_TD.dtype)
            del wide_PV
            if grad_x_TD is not None:
                grad_x_TD[begin : begin + part] = linear(grad_PV, weight_VD.T)
            if grad_weight_VD is not None:
                grad_weight_VD += linear(grad_PV.T, x_PD.T)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        grad_x = None if grad_x_TD is None else grad_x_TD * grad.to(grad_x_TD.dtype)
        grad_weight = None if grad_weight_VD is None else (grad_weight_VD * grad).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None


def _loss_and_gradient(logits_TV: Tensor, targets_T: Tensor, *, with_gradient: bool) -> Tensor:
    """Return ``summed_loss``, and ``with_gradient`` replace the logits by its gradient: softmax - one-hot target."""
    counts_T1 = (targets_T != IGNORED_LABEL)[:, None]
    targets_T1 = targets_T[:, None].where(counts_T1, 0)
    log_sum_T1 = logits_TV.logsumexp(-1, keepdim=True)
    # where, not a product: a logit of an ignored position may be infinite.
    loss = (log_sum_T1 - logits_TV.gather(-1, targets_T1)).where(counts_T1, 0).sum()
    if with_gradient:
        logits_TV.sub_(log_sum_T1).exp_()
        logits_TV.scatter_add_(-1, targets_T1, logits_TV.new_full(targets_T1.shape, -1))
        logits_TV.masked_fill_(~counts_T1, 0)
    return loss
