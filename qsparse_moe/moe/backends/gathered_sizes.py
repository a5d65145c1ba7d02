"""Sizes of the experts' matrices as the products read them: widths of the model, or of the features that are shared."""

from __future__ import annotations

from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.config.shared_selection_rules import gathers
from qsparse_moe.sparsity.plan import SparsityPlan, site_num_selected

_WIDTHS: dict[Site, str] = {"expert_input": "model.hidden_size", "expert_hidden": "model.moe.expert_hidden_size"}


def expert_sizes(config: ModelConfig) -> dict[str, set[int]]:
    """Return the sizes of the experts' matrices by the setting, or by the selection, that they come from.

    With gathered products every layer multiplies with as many features as its largest set.
    """
    widths = {"expert_input": config.hidden_size, "expert_hidden": config.moe.expert_hidden_size}
    sizes = {name: {widths[site]} for site, name in _WIDTHS.items()}
    if gathers(config):
        plan = SparsityPlan.from_config(config)
        for site in _WIDTHS:
            # The largest set of a layer is that of its smallest S.
            values = {min(plan.values[layer, site]) for layer in moe_layers(config)}
            counts = {site_num_selected(config.sparsity, value, widths[site]) for value in values}
            sizes[f"the number of features that model.sparsity shares at {site}"] = counts
    return sizes


def ramps(config: ModelConfig) -> str | None:
    """Return the reason why the sizes of gathered products are not fixed, or None."""
    steps = config.sparsity.schedule.ramp_steps
    if not (gathers(config) and steps):
        return None
    return (
        f"model.sparsity.schedule.ramp_steps ({steps}) changes the number of shared features from step to step, and it "
        "takes only some; set model.sparsity.shared.products to masked"
    )
