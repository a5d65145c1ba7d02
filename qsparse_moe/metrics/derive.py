"""Metrics of a logged step, derived from its report. L layers that have the site, E experts.

Sums are added over micro-batches and ranks first and divided last.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import layers_with_site
from qsparse_moe.metrics.names import is_listed, layer_name
from qsparse_moe.metrics.ratios import layer_ratios, mean_over_layers
from qsparse_moe.metrics.window import Window
from qsparse_moe.runs.report import LateEvaluation, StepReport


def derive_metrics(report: StepReport, model: ModelConfig, window: Window | None = None) -> dict[str, float]:
    """Return every metric of one logged step by its recorded name; ``names.METRICS`` defines each of them.

    A ratio whose denominator is 0 in a layer is absent for that layer and left out of the mean over the layers.
    ``window`` holds the previous logged steps; without it, metrics of several steps are absent.
    """
    metrics = _scalars(report)
    norms = report.layer_grad_norms or ()
    metrics |= {layer_name("train/grad_norm", layer): norm for layer, norm in enumerate(norms)}
    by_layer = layer_ratios(report.stats)
    if report.router_bias_LE is not None:
        by_layer["router/bias_range"] = report.router_bias_LE.amax(-1) - report.router_bias_LE.amin(-1)
    if window is not None:
        by_layer |= window.update(report.stats)
    for name, values_L in by_layer.items():
        metrics |= _over_layers(name, values_L, layers_with(name, model))
    metrics |= evaluation_metrics(report, model)
    # Our own mistake, found by any test that logs a step: a metric without a definition would have no unit on its card.
    unlisted = [name for name in metrics if not is_listed(name)]
    assert not unlisted, f"metrics that names.METRICS does not define: {unlisted}"
    return metrics


def evaluation_metrics(report: StepReport | LateEvaluation, model: ModelConfig) -> dict[str, float]:
    """Return the metrics of the evaluation that followed a step by name, none where there was none."""
    metrics = {f"validation/{name}": float(value) for name, value in (report.validation or {}).items()}
    if report.choice_agreement_L is None:
        return metrics
    name = "router/choice_agreement"
    return metrics | _over_layers(name, report.choice_agreement_L, layers_with(name, model))


def _scalars(report: StepReport) -> dict[str, float]:
    train = report.losses | {
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "sparsity": report.sparsity,
    }
    known = {"loss_scale": report.loss_scale, "skipped_steps": report.skipped_steps}
    train |= {name: value for name, value in known.items() if value is not None}
    throughput = {"tokens_per_second": report.tokens_per_second, "step_seconds": report.step_seconds}
    throughput |= {f"{part}_seconds": seconds for part, seconds in report.phase_seconds.items()}
    if report.checkpoint_seconds is not None:
        throughput["checkpoint_seconds"] = report.checkpoint_seconds
    groups = {
        "train": train,
        "throughput": throughput,
        "memory": report.memory,
    }
    return {f"{group}/{name}": float(value) for group, values in groups.items() for name, value in values.items()}


def layers_with(name: str, model: ModelConfig) -> list[int]:
    """Return the layers, counted from 0, that the sums behind the metric ``name`` are of, in order."""
    # Every layer that has a router has experts.
    site = "expert_input" if name.startswith("router/") else cast(Site, name.split("/")[1])
    return list(layers_with_site(model, site))


def _over_layers(name: str, values_L: Tensor, layers: list[int]) -> dict[str, float]:
    """Return the mean over the layers that have a value, then the value of each; nothing if no layer has one."""
    by_layer = zip(layers, values_L.tolist(), strict=True)
    # Only NaN differs from itself: it marks a layer without a denominator.
    present = {layer_name(name, layer): value for layer, value in by_layer if value == value}
    return {name: mean_over_layers(values_L)} | present if present else {}
