"""Fraction of nonzero features at every site of a model, as planned or as measured in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites, site_width
from qsparse_moe.sparsity.plan import SparsityPlan, site_num_selected

Densities = Mapping[tuple[int, Site], tuple[float, ...]]
"""The share of nonzero features by (layer, site): one number, or one per expert at the experts' sites."""

_ZEROS = "sparsity/{site}/zeros/layer_{layer}"


def no_zeros(config: ModelConfig) -> Densities:
    """Return densities of 1 everywhere: no feature is zero at any site."""
    return {(layer, site): (1.0,) for layer in range(config.num_layers) for site in layer_sites(config, layer)}


def planned_densities(config: ModelConfig, plan: SparsityPlan | None = None) -> Densities:
    """Return K over the width, from ``plan`` (None: that of the config).

    Natural zeros among the selected features are not known before a run; see ``measured_densities``.
    """
    plan = plan or SparsityPlan.from_config(config)
    found: dict[tuple[int, Site], tuple[float, ...]] = {}
    for layer in range(config.num_layers):
        for site in layer_sites(config, layer):
            width = site_width(config, site)
            found[layer, site] = tuple(count / width for count in selected_features(config, plan, layer, site))
    return found


def measured_densities(config: ModelConfig, row: Mapping[str, Any]) -> Densities | None:
    """Return the densities that one logged step measured, natural zeros included.

    Every expert of a layer is given the mean of the layer, because the log has no figures per expert.

    Args:
        config: of the run that logged it.
        row: a line of ``metrics.jsonl`` as a mapping.

    Returns:
        None if the row lacks the zeros of some site.
    """
    found: dict[tuple[int, Site], tuple[float, ...]] = {}
    for layer in range(config.num_layers):
        for site in layer_sites(config, layer):
            zeros = row.get(_ZEROS.format(site=site, layer=layer))
            # Figures of some sites only would mix measured zeros with planned ones.
            if zeros is None:
                return None
            found[layer, site] = (1.0 - zeros,) * (config.moe.num_experts if site in EXPERT_SITES else 1)
    return found


def selected_features(config: ModelConfig, plan: SparsityPlan, layer: int, site: Site) -> list[int]:
    """Return K at one site of one layer: one number, or one per expert at the experts' sites."""
    values, width = plan.values[layer, site], site_width(config, site)
    # Computed once per distinct value: a layer may have hundreds of experts with a few values of S.
    counts = {sparsity: site_num_selected(config.sparsity, sparsity, width) for sparsity in set(values)}
    return [counts[sparsity] for sparsity in values]
