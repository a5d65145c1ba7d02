"""Histograms of router probabilities and of thresholds. L layers, H bins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard.summary import histogram_raw

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import layers_with_site, model_sites, moe_layers
from qsparse_moe.sparsity.log_counts import MAGNITUDES, PROBABILITIES, LogBins
from qsparse_moe.sparsity.stats import Stats


def histograms(stats: Stats, model: ModelConfig) -> Iterator[tuple[str, Tensor, Sequence[int], LogBins]]:
    """Yield the histograms of one logged step: name, counts ``(L, H)``, the numbers of the L layers, and the H bins."""
    if "router/probability_counts_LH" in stats:
        yield "router/log2_probability", stats["router/probability_counts_LH"], moe_layers(model), PROBABILITIES
    for site in model_sites(model):
        counts_LH = stats.get(f"sparsity/{site}/smallest_counts_LH")
        if counts_LH is not None:
            yield f"sparsity/{site}/log2_threshold", counts_LH, layers_with_site(model, site), MAGNITUDES


def histogram_summary(tag: str, counts_H: Tensor, bins: LogBins) -> Any | None:
    """Return the histogram as TensorBoard's ``Summary``, or None if nothing was counted.

    Empty bins at both ends are left out: TensorBoard divides the range that it is given into 30 bins of equal width.
    """
    counts = counts_H.numpy()
    # Edges are logarithms: on a linear axis of magnitudes, all thresholds but the largest share one bin.
    edges = np.asarray(bins.edges)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    part = slice(filled[0], filled[-1] + 1)
    counts, lower, upper = counts[part], edges[:-1][part], edges[1:][part]
    # The values themselves are gone: each counts with the middle of its bin.
    middle = (lower + upper) / 2
    return histogram_raw(
        tag,
        min=lower[0],
        max=upper[-1],
        num=counts.sum(),
        sum=(counts * middle).sum(),
        sum_squares=(counts * middle**2).sum(),
        bucket_limits=upper.tolist(),
        bucket_counts=counts.tolist(),
    )
