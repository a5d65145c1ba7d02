"""Collect the figures of a run's model in one JSON-able dictionary, which ``qsparse-moe describe`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsparse_moe.accounting.activations import activation_memory
from qsparse_moe.accounting.densities import Densities, measured_densities, planned_densities, selected_features
from qsparse_moe.accounting.flops import flops_by_site, forward_flops, training_flops
from qsparse_moe.accounting.memory import kv_cache_bytes, state_memory
from qsparse_moe.accounting.parameters import count_by_part, count_parameters, count_with_embedding
from qsparse_moe.accounting.traffic import total_traffic, weight_traffic
from qsparse_moe.config.schema import ModelConfig, RunConfig, Site
from qsparse_moe.config.shapes import layer_sites, model_sites, moe_layers, site_width
from qsparse_moe.sparsity.plan import SparsityPlan

# The names under which the dictionary has these figures since its first version: scripts read them.
_REPORT_NAMES = {"needed": "kept", "saved": "kept"}
BATCHES = tuple(2**power for power in range(11))
"""Numbers of tokens per step for which the bytes of weights read are listed."""


def describe_run(config: RunConfig, row: Mapping[str, Any] | None = None, *, ranks: int = 1) -> dict[str, Any]:
    """Return the figures of a run's model.

    In the counts of parameters, ``stored`` counts all of them, ``active`` those that routing selects for a token, and
    ``kept`` those needed, which are the active ones whose input is not zero. A token uses one row of the embedding;
    ``parameters_with_embedding`` counts all of it, as most published figures do. Operations are per token of a
    full sequence. Bytes are those of the weights in the run's precision.

    Args:
        config: the run.
        row: the last logged step of the run; where it holds the measured zeros, ``measured`` repeats the figures that
            depend on sparsity with them.
        ranks: number of ranks over which the training state is sharded.
    """
    model, plan = config.model, SparsityPlan.from_config(config.model)
    planned, measured = planned_densities(model, plan), measured_densities(model, row) if row else None
    return {
        "name": config.training.name,
        **_parameters(model, planned),
        "parameters_with_embedding": _report_fields(count_with_embedding(model, densities=planned)),
        **_work(config, plan, planned),
        "memory": _memory(config, ranks),
        "mean_sparsity": plan.mean,
        "experts_per_token": _experts_per_token(model, plan, measured),
        "sites": {site: _site(model, plan, site) for site in model_sites(model)},
        "tokens_per_step": config.training.global_batch_size * config.data.sequence_length,
        "tokens": config.training.steps * config.training.global_batch_size * config.data.sequence_length,
        "measured": _measured(config, row, plan, measured) if row and measured else None,
    }


def _report_fields(figures: Any) -> dict[str, Any]:
    """Return the fields of a dataclass of figures under their names in the report."""
    return {_REPORT_NAMES.get(name, name): value for name, value in vars(figures).items()}


def _parameters(model: ModelConfig, densities: Densities) -> dict[str, Any]:
    by_part = count_by_part(model, densities=densities)
    return {
        "parameters": _report_fields(count_parameters(model, densities=densities)),
        "parameters_by_part": {part: _report_fields(counted) for part, counted in by_part.items()},
    }


def _work(config: RunConfig, plan: SparsityPlan, densities: Densities) -> dict[str, Any]:
    """Return the figures that depend on the share of zeros: operations, and bytes of weights read."""
    model, context = config.model, config.data.sequence_length
    forward = forward_flops(model, context, plan, densities=densities)
    training = training_flops(model, context, plan, densities=densities)
    by_site = flops_by_site(model, context, plan, densities=densities)
    return {
        "forward_flops_per_token": {"context": context, **_report_fields(forward)},
        "training_flops_per_token": {"context": context, **_report_fields(training)},
        "forward_flops_by_site": {name: _report_fields(flops) for name, flops in by_site.items()},
        "bytes_read": [_bytes_read(config, batch, densities) for batch in BATCHES],
    }


def _bytes_read(config: RunConfig, batch: int, densities: Densities) -> dict[str, float]:
    bytes_per_weight = 4.0 if config.training.precision == "fp32" else 2.0
    parts = weight_traffic(config.model, batch, densities, bytes_per_weight=bytes_per_weight)
    return {"batch": batch, **_report_fields(total_traffic(parts))}


def _memory(config: RunConfig, ranks: int) -> dict[str, Any]:
    cache = kv_cache_bytes(config.model, 1, bytes_per_value=4 if config.training.precision == "fp32" else 2)
    # All ZeRO stages, not the configured one alone: the table is there to choose a stage by.
    states = {stage: state_memory(config, ranks, stage) for stage in range(4)}
    by_stage = {str(stage): vars(memory) | {"total": memory.total} for stage, memory in states.items()}
    activations = activation_memory(config)
    return {
        "ranks": ranks,
        "training_state_by_zero_stage": by_stage,
        "activations": _report_fields(activations) | {"total": activations.total},
        "kv_cache_bytes_per_token": cache,
    }


def _measured(config: RunConfig, row: Mapping[str, Any], plan: SparsityPlan, densities: Densities) -> dict[str, Any]:
    return {"step": row["step"], **_parameters(config.model, densities), **_work(config, plan, densities)}


def _experts_per_token(model: ModelConfig, plan: SparsityPlan, measured: Densities | None) -> list[dict[str, Any]]:
    """Return the experts per token of every MoE layer if the plan sets them anywhere, planned and as measured."""
    if not (plan.experts_per_token or plan.top_p):
        return []
    return [
        {
            "layer": layer,
            # An upper limit if top_p is below 1.
            "most": plan.experts(layer, model.moe.experts_per_token),
            "top_p": plan.top_p.get(layer, 1.0),
            "measured": measured.experts_per_token.get(layer) if measured else None,
        }
        for layer in moe_layers(model)
    ]


def _site(model: ModelConfig, plan: SparsityPlan, site: Site) -> dict[str, int]:
    layers = [layer for layer in range(model.num_layers) if site in layer_sites(model, layer)]
    counts = [count for layer in layers for count in selected_features(model, plan, layer, site)]
    width = site_width(model, site)
    return {"layers": len(layers), "width": width, "least_kept": min(counts), "most_kept": max(counts)}
