"""Charts of TensorBoard's Custom Scalars page, grouped by the question that they answer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qsparse_moe.config.schema import MetricsConfig, ModelConfig, MoEConfig, RunConfig
from qsparse_moe.config.shapes import model_sites
from qsparse_moe.metrics.names import METRICS

Layout = dict[str, dict[str, list[object]]]


def chart_layout(config: RunConfig) -> Layout:
    """Return the charts of the Custom Scalars page: by question, then by title."""
    return {
        "Does it learn?": _learning_charts(config.metrics),
        "Is the load even?": _load_charts(config.model.moe),
        "Is the router confident?": {
            "Entropy of the router's probabilities, nats": _lines("router/choice_entropy"),
            "Weight of the first expert": _lines("router/first_weight"),
            "Routing choices unchanged since the previous evaluation": _lines("router/choice_agreement"),
            "z-loss": _lines("train/router_z_loss"),
        },
        "What does sparsity cost?": _sparsity_charts(config.model),
        "What is saved if every zero is skipped?": {
            "Active parameters, and those whose input is not zero": _lines(
                "efficiency/active_parameters", "efficiency/kept_parameters"
            ),
            "Training FLOPs per token: executed, and left if every zero is skipped": _lines(
                "efficiency/training_flops_per_token", "efficiency/kept_training_flops_per_token"
            ),
            "Bytes of weights read per generation step of 1 and 16 tokens": _lines(
                "efficiency/weight_bytes_1", "efficiency/weight_bytes_16"
            ),
            "Loss over executed GFLOPs": _lines("cost/lm_loss_by_executed_gflops"),
            "Loss over GFLOPs left if every zero is skipped": _lines("cost/lm_loss_by_kept_gflops"),
        },
        "How fast is it, and how much memory does it use?": {
            "Tokens per second": _lines("throughput/tokens_per_second"),
            "Seconds per step": _lines("throughput/step_seconds"),
            "Seconds per phase of a step": _lines(
                *(f"throughput/{part}_seconds" for part in ("data", "forward", "backward", "update", "communication"))
            ),
            "Memory, bytes": _lines(*(metric.name for metric in METRICS if metric.name.startswith("memory/"))),
        },
    }


def _learning_charts(metrics: MetricsConfig) -> dict[str, list[object]]:
    by_layer = {"Gradient norm by layer": _by_layer("train/grad_norm")} if metrics.layer_gradients else {}
    return {
        "Loss, nats per token": _lines("train/lm_loss", "validation/loss"),
        "Validation loss, bits per byte": _lines("validation/bits_per_byte"),
        "Gradient norm": _lines("train/grad_norm"),
        **by_layer,
        "Learning rate": _lines("train/learning_rate"),
    }


def _load_charts(moe: MoEConfig) -> dict[str, list[object]]:
    charts = {
        "Load of the busiest expert over the mean": _lines("router/load_imbalance"),
        "Load of the busiest expert over the mean, by layer": _by_layer("router/load_imbalance"),
        "Experts without a token, by layer": _by_layer("router/dead_experts"),
        "Experts without a token in the whole window": _lines("router/dead_experts_window"),
        "Experts that a token uses": _lines("router/experts_per_token"),
        "Load-balance loss": _lines("train/load_balance_loss"),
    }
    if moe.capacity_factor is not None:
        charts["Fraction of routed tokens dropped"] = _lines("router/dropped_share")
    if moe.bias_update_rate:
        charts["Range of the balancing biases"] = _lines("router/bias_range")
    return charts


def _sparsity_charts(model: ModelConfig) -> dict[str, list[object]]:
    sites = model_sites(model)
    charts = {
        "S of the plan": _lines("train/sparsity"),
        "Zeros in front of the matrices": _lines(*(f"sparsity/{site}/zeros" for site in sites)),
        "Energy after the selection": _lines(*(f"sparsity/{site}/kept_energy" for site in sites)),
        "Features unused in ten logged steps": _lines(*(f"sparsity/{site}/dead_features" for site in sites)),
        "Non-zero in the next token as well": _lines(*(f"sparsity/{site}/overlap" for site in sites)),
        "Threshold: smallest selected magnitude": _lines(*(f"sparsity/{site}/threshold" for site in sites)),
        "Drift of the threshold": _lines(*(f"sparsity/{site}/threshold_drift" for site in sites)),
    }
    for site in sites:
        charts[f"Zeros by layer, {site}"] = _by_layer(f"sparsity/{site}/zeros")
        charts[f"Energy after the selection by layer, {site}"] = _by_layer(f"sparsity/{site}/kept_energy")
    return charts


def _lines(*names: str) -> list[object]:
    """Return a chart of exactly these tags."""
    # TensorBoard takes each tag as a regular expression and matches it at the beginning of a tag only.
    return _chart(f"{re.escape(name)}$" for name in names)


def _by_layer(name: str) -> list[object]:
    # A pattern and not a list of layers: the page has one layout for all runs, whatever their depth.
    return _chart([f"{re.escape(name)}/layer_"])


def _chart(patterns: Iterable[str]) -> list[object]:
    return ["Multiline", list(patterns)]
