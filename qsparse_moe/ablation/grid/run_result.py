"""Read the result of a run from its folder, and count the cost of its model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qsparse_moe.ablation.grid.dense_comparison import dense_figures
from qsparse_moe.ablation.grid.earlier_results import recorded_settings
from qsparse_moe.ablation.grid.load import Grid, GridRun
from qsparse_moe.ablation.grid.results import RunResult
from qsparse_moe.accounting.densities import Densities, measured_densities, planned_densities
from qsparse_moe.accounting.flops import training_flops
from qsparse_moe.accounting.parameters import count_by_part, count_parameters
from qsparse_moe.accounting.traffic import total_traffic, weight_traffic
from qsparse_moe.config.schema import ModelConfig, RunConfig, Site
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.names import layer_name
from qsparse_moe.metrics.natural_zeros import natural_zeros
from qsparse_moe.runs.folder import is_finished, run_folder
from qsparse_moe.sparsity.plan import SparsityPlan

_TABLES = ("embedding", "head")
_PARTS = {
    "attention": "attention",
    "router": "router",
    "shared": "shared",
    "experts": "experts_active",
    "dense": "dense",
}


def result_of(grid: Grid, run: GridRun, error: str | None = None) -> RunResult:
    """Return the result that the folder of ``run`` holds now, or the one that the grid has from an earlier report.

    ``error`` is the reason why the run did not finish.
    """
    if run.id in grid.earlier:
        return grid.earlier[run.id]
    finished, error = _state(run.config, error)
    # The losses of an unfinished run belong to another point of the learning rate schedule than those of the others.
    rows = read_metrics(run_folder(run.config) / "metrics.jsonl") if finished else []
    if grid.continued:
        # The folder may belong to a longer run by now.
        rows = [row for row in rows if row["step"] <= run.config.training.steps]
    validated = [row for row in rows if row.get("validation/bits_per_byte") is not None]
    if grid.continued and finished and (not validated or validated[-1]["step"] != run.config.training.steps):
        finished, error, rows, validated = False, _no_evaluation(run.config), [], []
    last: dict[str, Any] = validated[-1] if validated else {}
    # The median is robust against the first steps, which include compilation.
    rates = [row["throughput/tokens_per_second"] for row in rows if row.get("throughput/tokens_per_second")]
    return RunResult(
        grid=grid.name,
        id=run.id,
        variant=run.variant,
        seed=run.seed,
        settings=dict(run.settings),
        finished=finished,
        error=error,
        steps=last.get("step", 0),
        tokens=last.get("tokens", 0),
        loss=last.get("validation/loss"),
        bits_per_byte=last.get("validation/bits_per_byte"),
        curve=[(row["tokens"], row["validation/loss"], row["validation/bits_per_byte"]) for row in validated],
        **_shape(run.config.model),
        **_cost(run.config, _densities(run.config.model, last)),
        tokens_per_second=statistics.median(rates) if rates else None,
        choices=[(choice.label, list(choice.paths)) for choice in run.choices],
        varied_sparsity=_varied_sparsity(grid, run.config.model),
        natural_zeros=[(one.site, list(one.layers), one.zeros, one.chosen) for one in natural_zeros(last)],
        against_dense=dense_figures(grid, run) if finished else None,
        layer_grad_norms=_late_grad_norms(rows, run.config.training.steps, run.config.model.num_layers),
        config=recorded_settings(run.config),
    )


def _varied_sparsity(grid: Grid, model: ModelConfig) -> list[tuple[int, Site, list[int] | None, float]]:
    """Return S at the sites that the grid varies, with one entry per group of experts with the same S."""
    plan = SparsityPlan.from_config(model)
    found: list[tuple[int, Site, list[int] | None, float]] = []
    for layer, site in grid.varied_sites:
        values = plan.values[layer, site]
        for sparsity in dict.fromkeys(values):
            experts = [expert for expert, value in enumerate(values) if value == sparsity]
            found.append((layer, site, None if len(experts) == len(values) else experts, sparsity))
    return found


def _state(config: RunConfig, error: str | None) -> tuple[bool, str | None]:
    """Return whether the run is finished, and the reason why not."""
    try:
        return is_finished(config), error
    except (ConfigError, CheckpointError) as refused:
        return False, error or str(refused)


def _no_evaluation(config: RunConfig) -> str:
    return (
        f"{run_folder(config)} has been trained beyond step {config.training.steps} without an evaluation there, so "
        "that the result at this length is unknown; choose another --output-dir, or remove this length from the grid"
    )


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "num_experts": model.moe.num_experts,
        "experts_per_token": model.moe.experts_per_token,
        "expert_hidden_size": model.moe.expert_hidden_size,
        "sparsity": SparsityPlan.from_config(model).mean,
    }


def _densities(model: ModelConfig, row: Mapping[str, Any]) -> Densities:
    """Return planned densities, or measured ones if S follows from the data and the run has measured it."""
    if model.sparsity.selection in ("topk", "block"):
        return planned_densities(model)
    return measured_densities(model, row) or planned_densities(model)


def _cost(config: RunConfig, densities: Densities) -> dict[str, Any]:
    model = config.model
    parts = count_by_part(model, densities=densities)
    counted = count_parameters(model, densities=densities)
    # The vocabulary dominates small models and is the same for all runs of a grid.
    tables = sum(parts[part].stored for part in _TABLES if part in parts)
    training = training_flops(model, config.data.sequence_length, densities=densities)
    return {
        "total_parameters": counted.stored - tables,
        "embedding_parameters": tables,
        "active_parameters": counted.active,
        "kept_parameters": counted.needed,
        "active_weights_by_part": {name: parts[part].active for part, name in _PARTS.items() if part in parts},
        "training_flops_per_token": training.routed,
        "kept_training_flops_per_token": training.needed,
        "weight_bytes_1": _bytes(config, 1, densities),
        "weight_bytes_16": _bytes(config, 16, densities),
    }


def _bytes(config: RunConfig, batch: int, densities: Densities) -> float:
    bytes_per_weight = 4.0 if config.training.precision == "fp32" else 2.0
    return total_traffic(weight_traffic(config.model, batch, densities, bytes_per_weight=bytes_per_weight)).needed


def _late_grad_norms(rows: Sequence[Mapping[str, Any]], steps: int, num_layers: int) -> list[float] | None:
    """Return the mean gradient norm per layer over the second half of ``steps``; None if the run did not log norms."""
    names = [layer_name("train/grad_norm", layer) for layer in range(num_layers)]
    # The first half contains the warm-up, in which norms are not yet typical.
    late = [row for row in rows if 2 * row["step"] > steps and names[0] in row]
    return [statistics.mean(row[name] for row in late) for name in names] if late else None
