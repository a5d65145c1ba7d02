"""Selection by comparison with a threshold, which needs no ranking: calibrated, statistical, and ReLU selection.

All select the features above a threshold, so the number of selected features varies from row to row: around the target
S for calibrated and statistical thresholds, and with the signs for ReLU. Exact top-K, over rows or groups, is in
``topk.py``. The selections by magnitude always select at least the largest feature of a row. A NaN is above every
threshold, and a row whose statistics are not finite is selected as a whole, so that errors stay visible.

D features per row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def threshold_mask(x: Tensor, threshold: Tensor) -> Tensor:
    """Mark the features of every row whose magnitude is above ``threshold``, and always the largest one.

    Args:
        x: ``(*, D)`` activations.
        threshold: one value ``(1,)``, or one per row ``(*, 1)``; at least fp32. ``-inf`` selects everything.

    Returns:
        ``(*, D)`` bool with at least one true per row.
    """
    magnitude = x.detach().abs()
    # Not "magnitude > threshold", which is false for NaN.
    mask = ~(magnitude <= threshold)
    # Every mask that is not empty contains the largest feature, so marking it changes the empty ones only. Looking for
    # empty masks instead would wait for the device.
    return mask.scatter_(-1, magnitude.argmax(-1, keepdim=True), True)


def statistical_mask(x: Tensor, quantile: Tensor) -> Tensor:
    """Mark the features above ``mean + quantile * std`` of the magnitudes of their row, and always the largest one.

    This is the statistical top-K of Gemma 3n and the Spark Transformer (arXiv 2506.06644), applied to magnitudes: the
    quantile of the standard normal distribution at S replaces the rank. It selects a fraction 1 - S of normally
    distributed magnitudes. Of normal activations, whose magnitudes are half-normal, it selects 0.42 at S = 0.5 and 0.12
    at S = 0.9.

    Args:
        x: ``(*, D)`` activations.
        quantile: one value ``(1,)``, or one per row ``(*, 1)``; at least fp32. ``-inf`` selects everything.

    Returns:
        ``(*, D)`` bool with at least one true per row.
    """
    magnitude = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32))
    std, mean = torch.std_mean(magnitude, dim=-1, keepdim=True, correction=0)
    return threshold_mask(magnitude, mean + quantile * std)


def relu_mask(x: Tensor, threshold: Tensor) -> Tensor:
    """Mark the features above ``threshold``, signs included: with a threshold of 0 those that ReLU leaves nonzero.

    The Q-Sparse paper compares top-K with ReLU in front of every projection (arXiv 2407.10969, section 4).

    Args:
        x: ``(*, D)`` activations.
        threshold: one value ``(1,)``, or one per row ``(*, 1)``; at least fp32. ``-inf`` selects everything.

    Returns:
        ``(*, D)`` bool; no feature is selected in a row without a positive feature.
    """
    return ~(x.detach() <= threshold)


THRESHOLD_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "threshold": threshold_mask,
    "statistical": statistical_mask,
    "relu": relu_mask,
}
"""The mask function of each selection by threshold, by its name in ``model.sparsity.selection``."""
