"""The charts of TensorBoard's Custom Scalars page, grouped by the question that they answer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qsparse_moe.config.schema import MetricsConfig, ModelConfig, MoEConfig, RunConfig
from qsparse_moe.config.shapes import model_sites
from qsparse_moe.metrics.names import METRICS

Layout = dict[str, dict[str, list[object]]]


def chart_layout(config: RunConfig) -> Layout:
    """The charts of the Custom Scalars page by the question that they answer, then by title."""
    return {
        "Does it learn?": _learning_charts(config.metrics),
        "Is the load even?": _load_charts(config.model.moe),
        "Is the router sure?": {
            "Entropy of the choice, nats": _lines("router/choice_entropy"),
            "Weight of the first expert": _lines("router/first_weight"),
            "Choices that stand since the evaluation before": _lines("router/choice_agreement"),
            "z-loss": _lines("train/router_z_loss"),
        },
        "What does sparsity cost?": _sparsity_charts(config.model),
        "What does it save, if every zero is skipped?": {
            "Parameters that a token uses: by routing, and kept": _lines(
                "efficiency/active_parameters", "efficiency/kept_parameters"
            ),
            "FLOPs of training a token: executed, and kept": _lines(
                "efficiency/training_flops_per_token", "efficiency/kept_training_flops_per_token"
            ),
            "Bytes of weights that generating 1 and 16 tokens reads": _lines(
                "efficiency/weight_bytes_1", "efficiency/weight_bytes_16"
            ),
            "Loss over GFLOPs executed": _lines("cost/lm_loss_by_executed_gflops"),
            "Loss over GFLOPs kept": _lines("cost/lm_loss_by_kept_gflops"),
        },
        "How fast, and in how much memory?": {
            "Tokens a second": _lines("throughput/tokens_per_second"),
            "Seconds a step": _lines("throughput/step_seconds"),
            "Seconds of the parts of a step": _lines(
                *(f"throughput/{part}_seconds" for part in ("data", "forward", "backward", "update", "communication"))
            ),
            "Memory, bytes": _lines(*(metric.name for metric in METRICS if metric.name.startswith("memory/"))),
        },
    }


def _learning_charts(metrics: MetricsConfig) -> dict[str, list[object]]:
    by_layer = {"Gradient norm by layer": _by_layer("train/grad_norm")} if metrics.layer_gradients else {}
    return {
        "Loss, nats a token": _lines("train/lm_loss", "validation/loss"),
        "Validation, bits a byte": _lines("validation/bits_per_byte"),
        "Gradient norm": _lines("train/grad_norm"),
        **by_layer,
        "Learning rate": _lines("train/learning_rate"),
    }


def _load_charts(moe: MoEConfig) -> dict[str, list[object]]:
    charts = {
        "Busiest expert over the mean": _lines("router/load_imbalance"),
        "Busiest expert over the mean, by layer": _by_layer("router/load_imbalance"),
        "Experts without a row, by layer": _by_layer("router/dead_experts"),
        "Experts without a row in the whole window": _lines("router/dead_experts_window"),
        "Balance loss": _lines("train/load_balance_loss"),
    }
    if moe.capacity_factor is not None:
        charts["Share of the rows dropped"] = _lines("router/dropped_share")
    if moe.bias_update_rate:
        charts["Range of the balance biases"] = _lines("router/bias_range")
    return charts


def _sparsity_charts(model: ModelConfig) -> dict[str, list[object]]:
    sites = model_sites(model)
    charts = {
        "Asked for": _lines("train/sparsity"),
        "Zeros in front of the matrices": _lines(*(f"sparsity/{site}/zeros" for site in sites)),
        "Energy kept": _lines(*(f"sparsity/{site}/kept_energy" for site in sites)),
        "Features without a use in ten logged steps": _lines(*(f"sparsity/{site}/dead_features" for site in sites)),
        "Kept in the next token too": _lines(*(f"sparsity/{site}/overlap" for site in sites)),
        "Smallest magnitude kept": _lines(*(f"sparsity/{site}/threshold" for site in sites)),
        "Drift of the smallest magnitude kept": _lines(*(f"sparsity/{site}/threshold_drift" for site in sites)),
    }
    for site in sites:
        charts[f"Zeros by layer, {site}"] = _by_layer(f"sparsity/{site}/zeros")
        charts[f"Energy kept by layer, {site}"] = _by_layer(f"sparsity/{site}/kept_energy")
    return charts


def _lines(*names: str) -> list[object]:
    """A chart of exactly these tags: TensorBoard takes each as a regular expression and matches its beginning."""
    return _chart(f"{re.escape(name)}$" for name in names)


def _by_layer(name: str) -> list[object]:
    return _chart([f"{re.escape(name)}/layer_"])


def _chart(patterns: Iterable[str]) -> list[object]:
    return ["Multiline", list(patterns)]
