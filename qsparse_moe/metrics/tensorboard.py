"""The event files that TensorBoard shows: scalars, the run's configuration as text, and charts grouped by question."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.schema import MetricsConfig, ModelConfig, MoEConfig, RunConfig
from qsparse_moe.config.shapes import model_sites
from qsparse_moe.metrics.names import METRICS, is_layer_name, metric_of

Layout = dict[str, dict[str, list[object]]]


class TensorBoardFiles:
    """Writes one run's event files into a folder; several writers after each other continue the same curves."""

    def __init__(self, folder: Path, config: RunConfig, *, start_step: int = 0) -> None:
        """Open a new event file for a run that goes on after ``start_step`` steps.

        What earlier files hold of later steps is void from here on: TensorBoard drops it when it reads this file.
        """
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        self._writer.add_custom_scalars(chart_layout(config))
        self._writer.add_text("config", f"```yaml\n{config_to_yaml(config)}```", start_step)
        self._writer.flush()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one logged step; of the values by layer only those that are charted."""
        for name, value in metrics.items():
            if not is_layer_name(name) or metric_of(name).layers == "chart":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file; nothing can be written after."""
        self._writer.close()


def chart_layout(config: RunConfig) -> Layout:
    """The charts of the Custom Scalars page by the question that they answer, then by title."""
    return {
        "Does it learn?": _learning_charts(config.metrics),
        "Do all experts work?": _load_charts(config.model.moe),
        "Is the router sure?": {
            "Entropy of the choice, nats": _lines("router/choice_entropy"),
            "Weight of the first expert": _lines("router/first_weight"),
            "z-loss": _lines("train/router_z_loss"),
        },
        "How sparse is it, and what is lost?": _sparsity_charts(config.model),
        "How fast, and in how much memory?": {
            "Tokens a second": _lines("throughput/tokens_per_second"),
            "Seconds a step": _lines("throughput/step_seconds"),
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
