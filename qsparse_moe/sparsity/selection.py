"""Selections by a bound, which costs no ranking: a calibrated threshold, the row's own statistics, and ReLU's 0.

All keep the features above their bound, so how many varies from row to row: for the first two around the S that was
asked for, for ReLU as the signs fall. Exact top-K and its blocks stand in ``topk.py``. By magnitude a row always keeps
at least its largest feature. NaN is above every bound, and a row whose statistics are not finite is kept whole: what is
broken stays visible.

D features of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def threshold_mask(x: Tensor, threshold: Tensor) -> Tensor:
    """Mark the features of every row whose magnitude is above ``threshold``, and the largest one.

    Args:
        x: ``(*, D)`` activations.
        threshold: one value ``(1,)``, or one a row ``(*, 1)``; at least fp32. ``-inf`` keeps everything.

    Returns:
        ``(*, D)`` bool, at least one true a row.
    """
    magnitude = x.detach().abs()
    mask = ~(magnitude <= threshold)
    # The largest is in every mask that is not empty, so marking it changes only the empty ones and no count is awaited.
    return mask.scatter_(-1, magnitude.argmax(-1, keepdim=True), True)


def statistical_mask(x: Tensor, quantile: Tensor) -> Tensor:
    """Mark the features above ``mean + quantile * std`` of their row's magnitudes, and the largest one.

    This is the statistical top-K of Gemma 3n and the Spark Transformer (arXiv 2506.06644) on magnitudes: the quantile
    of the standard normal distribution at S stands for the rank. It keeps the share 1 - S where magnitudes are normal;
    of normal activations, whose magnitudes are half-normal, it keeps 0.42 at S = 0.5 and 0.12 at S = 0.9.

    Args:
        x: ``(*, D)`` activations.
        quantile: one value ``(1,)``, or one a row ``(*, 1)``; at least fp32. ``-inf`` keeps everything.

    Returns:
        ``(*, D)`` bool, at least one true a row.
    """
    magnitude = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32))
    std, mean = torch.std_mean(magnitude, dim=-1, keepdim=True, correction=0)
    return threshold_mask(magnitude, mean + quantile * std)


def relu_mask(x: Tensor, bound: Tensor) -> Tensor:
    """Mark the features above ``bound``, sign and all: with a bound of 0 those that ReLU keeps.

    ReLU in front of every projection is what the Q-Sparse paper compares top-K with (arXiv 2407.10969, section 4).

    Args:
        x: ``(*, D)`` activations.
        bound: one value ``(1,)``, or one a row ``(*, 1)``; at least fp32. ``-inf`` keeps everything.

    Returns:
        ``(*, D)`` bool; a row without a positive feature keeps none.
    """
    return ~(x.detach() <= bound)


THRESHOLD_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "threshold": threshold_mask,
    "statistical": statistical_mask,
    "relu": relu_mask,
}
"""The rule of a selection by its name in ``model.sparsity.selection``; the others rank (``topk.py``)."""
