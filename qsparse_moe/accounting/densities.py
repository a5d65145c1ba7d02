"""Fraction of non-zero features at every site of a model: by a plan, or as measured in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites, site_width
from qsparse_moe.sparsity.plan import SparsityPlan, site_num_kept

Densities = Mapping[tuple[int, Site], tuple[float, ...]]
"""By (layer, site) the share of the features that are not zero: one number, or one an expert at the experts' sites."""

_ZEROS = "sparsity/{site}/zeros/layer_{layer}"


def no_zeros(config: ModelConfig) -> Densities:
    """Every feature is left, at every expert alike."""
    return {(layer, site): (1.0,) for layer in range(config.num_layers) for site in layer_sites(config, layer)}


def planned_densities(config: ModelConfig, plan: SparsityPlan | None = None) -> Densities:
    """K over the width, from ``plan`` (None: that of the config); natural zeros among the kept are not known here."""
    plan = plan or SparsityPlan.from_config(config)
    found: dict[tuple[int, Site], tuple[float, ...]] = {}
    for layer in range(config.num_layers):
        for site in layer_sites(config, layer):
            width = site_width(config, site)
            found[layer, site] = tuple(kept / width for kept in kept_features(config, plan, layer, site))
    return found


def measured_densities(config: ModelConfig, row: Mapping[str, Any]) -> Densities | None:
    """What one logged step measured, zeros by nature among them: every expert of a layer has the layer's share.

    Args:
        config: of the run that logged it.
        row: a line of ``metrics.jsonl`` as a mapping.

    Returns:
        None where the row lacks the zeros of some place.
    """
    found: dict[tuple[int, Site], tuple[float, ...]] = {}
    for layer in range(config.num_layers):
        for site in layer_sites(config, layer):
            zeros = row.get(_ZEROS.format(site=site, layer=layer))
            if zeros is None:
                return None
            found[layer, site] = (1.0 - zeros,) * (config.moe.num_experts if site in EXPERT_SITES else 1)
    return found


def kept_features(config: ModelConfig, plan: SparsityPlan, layer: int, site: Site) -> list[int]:
    """K at a place: one number, or one an expert at the experts' sites."""
    values, width = plan.values[layer, site], site_width(config, site)
    # Hundreds of experts share few values.
    kept = {sparsity: site_num_kept(config.sparsity, sparsity, width) for sparsity in set(values)}
    return [kept[sparsity] for sparsity in values]
