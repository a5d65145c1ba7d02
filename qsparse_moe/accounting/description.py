"""The figures of a run's model, as one JSON-able dictionary: what ``qsparse-moe describe`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsparse_moe.accounting.densities import Densities, kept_features, measured_densities
from qsparse_moe.accounting.flops import flops_by_site, forward_flops, training_flops
from qsparse_moe.accounting.memory import kv_cache_bytes, state_memory
from qsparse_moe.accounting.parameters import count_by_part, count_parameters
from qsparse_moe.accounting.traffic import total_traffic, weight_traffic
from qsparse_moe.config.schema import ModelConfig, RunConfig, Site
from qsparse_moe.config.shapes import layer_sites, model_sites, site_width
from qsparse_moe.sparsity.plan import SparsityPlan

BATCHES = tuple(2**power for power in range(11))
"""Tokens of one step for which the bytes are told."""


def describe_run(config: RunConfig, row: Mapping[str, Any] | None = None, *, ranks: int = 1) -> dict[str, Any]:
    """The figures of a run's model.

    Of parameters, ``stored`` counts all, ``active`` those that a token uses by routing, ``kept`` those whose input
    Q-Sparse keeps too. Operations are per token over a full row. Bytes are those of the weights in the run's precision.

    Args:
        config: the run.
        row: the last logged step of the run; where it holds the measured zeros, ``measured`` repeats the figures that
            depend on sparsity with them.
        ranks: over which the state of training is spread.
    """
    model = config.model
    densities = measured_densities(model, row) if row else None
    return {
        "name": config.training.name,
        "parameters": vars(count_parameters(model)),
        "parameters_by_part": {part: vars(counted) for part, counted in count_by_part(model).items()},
        **_work(config),
        "memory": _memory(config, ranks),
        "mean_sparsity": SparsityPlan.from_config(model).mean,
        "sites": {site: _site(model, site) for site in model_sites(model)},
        "tokens_per_step": config.training.global_batch_size * config.data.sequence_length,
        "tokens": config.training.steps * config.training.global_batch_size * config.data.sequence_length,
        "measured": _measured(config, row, densities) if row and densities else None,
    }


def _work(config: RunConfig, densities: Densities | None = None) -> dict[str, Any]:
    """Operations and bytes: what depends on the share of zeros."""
    model, context = config.model, config.data.sequence_length
    by_site = flops_by_site(model, context, densities=densities)
    return {
        "forward_flops_per_token": {"context": context, **vars(forward_flops(model, context, densities=densities))},
        "training_flops_per_token": {"context": context, **vars(training_flops(model, context, densities=densities))},
        "forward_flops_by_site": {name: vars(flops) for name, flops in by_site.items()},
        "bytes_read": [_bytes_read(config, batch, densities) for batch in BATCHES],
    }


def _bytes_read(config: RunConfig, batch: int, densities: Densities | None) -> dict[str, float]:
    bytes_per_weight = 4.0 if config.training.precision == "fp32" else 2.0
    parts = weight_traffic(config.model, batch, densities, bytes_per_weight=bytes_per_weight)
    return {"batch": batch, **vars(total_traffic(parts))}


def _memory(config: RunConfig, ranks: int) -> dict[str, Any]:
    cache = kv_cache_bytes(config.model, 1, bytes_per_value=4 if config.training.precision == "fp32" else 2)
    states = {stage: state_memory(config, ranks, stage) for stage in range(4)}
    by_stage = {str(stage): vars(memory) | {"total": memory.total} for stage, memory in states.items()}
    return {"ranks": ranks, "training_state_by_zero_stage": by_stage, "kv_cache_bytes_per_token": cache}


def _measured(config: RunConfig, row: Mapping[str, Any], densities: Densities) -> dict[str, Any]:
    by_part = count_by_part(config.model, densities=densities)
    return {
        "step": row["step"],
        "parameters": vars(count_parameters(config.model, densities=densities)),
        "parameters_by_part": {part: vars(counted) for part, counted in by_part.items()},
        **_work(config, densities),
    }


def _site(model: ModelConfig, site: Site) -> dict[str, int]:
    plan = SparsityPlan.from_config(model)
    layers = [layer for layer in range(model.num_layers) if site in layer_sites(model, layer)]
    kept = [k for layer in layers for k in kept_features(model, plan, layer, site)]
    return {"layers": len(layers), "width": site_width(model, site), "least_kept": min(kept), "most_kept": max(kept)}
