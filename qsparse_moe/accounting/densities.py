"""Fraction of nonzero features at every site of a model, and experts per token, as planned or as measured in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites, moe_layers, site_width
from qsparse_moe.sparsity.plan import SparsityPlan, site_num_selected

_ZEROS = "sparsity/{site}/zeros/layer_{layer}"
_EXPERTS = "router/experts_per_token/layer_{layer}"


class Densities(dict[tuple[int, Site], tuple[float, ...]]):
    """The share of nonzero features by (layer, site): one number, or one per expert at the experts' sites."""

    def __init__(
        self,
        shares: Mapping[tuple[int, Site], tuple[float, ...]],
        experts_per_token: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(shares)
        self.experts_per_token = dict(experts_per_token or {})
        """Mean number of experts of a token by layer; the A of the model in a layer without an entry."""

    def experts(self, config: ModelConfig, layer: int) -> float:
        """Return the mean number of experts that a token uses in a layer with routed experts."""
        number = self.experts_per_token.get(layer, config.moe.experts_per_token)
        # Whole numbers stay exact counts.
        return int(number) if number == int(number) else number


def no_zeros(config: ModelConfig) -> Densities:
    """Return densities of 1 everywhere: no feature is zero at any site, and tokens use the A experts of the model."""
    return Densities(
        {(layer, site): (1.0,) for layer in range(config.num_layers) for site in layer_sites(config, layer)}
    )


def planned_densities(config: ModelConfig, plan: SparsityPlan | None = None) -> Densities:
    """Return K over the width, from ``plan`` (None: that of the config).

    Natural zeros among the selected features are not known before a run, and neither is the number of experts under
    ``top_p``, for which the largest number is taken; see ``measured_densities``.
    """
    plan = plan or SparsityPlan.from_config(config)
    found: dict[tuple[int, Site], tuple[float, ...]] = {}
    for layer in range(config.num_layers):
        for site in layer_sites(config, layer):
            width = site_width(config, site)
            found[layer, site] = tuple(count / width for count in selected_features(config, plan, layer, site))
    return Densities(found, plan.experts_per_token)


def measured_densities(config: ModelConfig, row: Mapping[str, Any]) -> Densities | None:
    """Return the densities that one logged step measured, natural zeros included, and its mean experts per token.

    Every expert of a layer is given the mean of the layer, because the log has no figures per expert.

    Args:
        config: of the run that logged it.
        row: a line of ``metrics.jsonl`` as a mapping.

    Returns:
        None if the row lacks the zeros of some site.
    """
    found: dict[tuple[int, Site], tuple[float, ...]] = {}
    used = {layer: row.get(_EXPERTS.format(layer=layer)) for layer in moe_layers(config)}
    # Runs of earlier versions have no such metric, and use the A of the model.
    experts_per_token = {layer: number for layer, number in used.items() if number is not None}
    for layer in range(config.num_layers):
        for site in layer_sites(config, layer):
            if site in EXPERT_SITES and experts_per_token.get(layer) == 0:
                # No token reaches the site, so it has no zeros and nothing is behind it.
                found[layer, site] = (1.0,) * config.moe.num_experts
                continue
            zeros = row.get(_ZEROS.format(site=site, layer=layer))
            # Figures of some sites only would mix measured zeros with planned ones.
            if zeros is None:
                return None
            found[layer, site] = (1.0 - zeros,) * (config.moe.num_experts if site in EXPERT_SITES else 1)
    return Densities(found, experts_per_token)


def selected_features(config: ModelConfig, plan: SparsityPlan, layer: int, site: Site) -> list[int]:
    """Return K at one site of one layer: one number, or one per expert at the experts' sites."""
    values, width = plan.values[layer, site], site_width(config, site)
    # Computed once per distinct value: a layer may have hundreds of experts with a few values of S.
    counts = {sparsity: site_num_selected(config.sparsity, sparsity, width) for sparsity in set(values)}
    return [counts[sparsity] for sparsity in values]
