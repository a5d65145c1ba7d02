"""Ratios of the sums that a forward pass returns. L layers, E experts, D features of a site."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.sparsity.stats import SITE_FIELDS, Stats


def scalar_ratios(stats: Stats) -> dict[str, float]:
    """Return one number per ratio from the sums of ``ModelOutput.stats``: the mean over the layers that have a value.

    The names and the values are those of the recorded metrics (``metrics.names``), such as ``router/load_imbalance``,
    ``router/choice_entropy``, ``sparsity/expert_hidden/zeros`` or ``sparsity/expert_hidden/kept_energy``. A ratio that
    no layer has is absent. The sums of several batches or ranks may be added first (``sparsity.stats.add_stats``).

    Args:
        stats: sums of a forward pass with ``with_stats=True``; ratios whose sums are missing are left out.
    """
    return {name: mean for name, ratio_L in layer_ratios(stats).items() if (mean := mean_over_layers(ratio_L)) == mean}


def mean_over_layers(ratio_L: Tensor) -> float:
    """Return the mean over the layers whose ratio is not NaN; NaN if there is none."""
    values = [value for value in ratio_L.tolist() if value == value]
    return sum(values) / len(values) if values else float("nan")


def layer_ratios(stats: Stats) -> dict[str, Tensor]:
    """Return the ratios ``(L,)`` by metric name; NaN where the denominator of a layer is 0.

    Args:
        stats: the float64 sums of ``ModelOutput.stats``; ratios whose sums are missing are left out.
    """
    ratios: dict[str, Tensor] = {}
    if "router/routed_LE" in stats:
        ratios |= load_ratios(stats["router/routed_LE"])
    if "router/dropped_LE" in stats:
        # Routed tokens are counted before the capacity cuts them, so they include the dropped ones.
        ratios["router/dropped_share"] = stats["router/dropped_LE"].sum(-1) / stats["router/routed_LE"].sum(-1)
    if "router/tokens_L" in stats:
        tokens_L = stats["router/tokens_L"]
        ratios["router/choice_entropy"] = stats["router/choice_entropy_L"] / tokens_L
        ratios["router/experts_per_token"] = stats["router/routed_LE"].sum(-1) / tokens_L
        ratios["router/first_weight"] = stats["router/first_weight_L"] / tokens_L
    for site in sorted({key.split("/")[1] for key in stats if key.startswith("sparsity/")}):
        ratios |= _site_ratios(stats, f"sparsity/{site}")
    return ratios


def load_ratios(routed_LE: Tensor) -> dict[str, Tensor]:
    """Return how evenly the experts of each layer are loaded ``(L,)``, from their routed tokens ``(L, E)``."""
    shares_LE = routed_LE / routed_LE.sum(-1, keepdim=True)
    busiest_L = shares_LE.amax(-1)
    return {
        # Largest load over the mean load: MaxVio plus 1 (arXiv 2408.15664).
        "router/load_imbalance": busiest_L * routed_LE.shape[-1],
        # entr(0) is 0; with -p * log(p), an expert without a token would make the entropy NaN.
        "router/load_entropy": torch.special.entr(shares_LE).sum(-1),
        "router/busiest_share": busiest_L,
        "router/dead_experts": (routed_LE == 0).sum(-1).double(),
    }


def _site_ratios(stats: Stats, site: str) -> dict[str, Tensor]:
    # Over the experts first: the ratio of a layer weights each expert by its tokens.
    sums_L = {name: stats[f"{site}/{name}_LE"].sum(-1) for name in SITE_FIELDS}
    features_L = sums_L["rows"] * stats[f"{site}/used_LED"].shape[-1]
    return {
        f"{site}/zeros_chosen": 1 - sums_L["selected"] / features_L,
        f"{site}/zeros": 1 - sums_L["nonzero"] / features_L,
        f"{site}/kept_energy": sums_L["kept_energy"] / sums_L["energy"],
        f"{site}/overlap": sums_L["pairs_common"] / sums_L["pairs_nonzero"],
        f"{site}/threshold": sums_L["smallest"] / sums_L["rows"],
    }
