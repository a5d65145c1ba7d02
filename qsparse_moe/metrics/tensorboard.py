"""The event files that TensorBoard shows: scalars, the run's configuration as text, and charts grouped by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.metrics.charts import chart_layout
from qsparse_moe.metrics.heatmaps import HeatMap, heat_maps, scale_of
from qsparse_moe.metrics.histograms import add_histogram, histograms
from qsparse_moe.metrics.names import is_layer_name, layer_name, metric_of
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.stats import Stats

_COSTS = {
    "cost/lm_loss_by_executed_gflops": "efficiency/total_training_flops",
    "cost/lm_loss_by_kept_gflops": "efficiency/total_kept_training_flops",
}
"""The curves whose step is a cost, by the metric that is the cost."""
SUMMARY_METRICS = (
    "validation/bits_per_byte",
    "train/lm_loss",
    "efficiency/active_parameters",
    "efficiency/kept_parameters",
    "efficiency/total_training_flops",
    "throughput/tokens_per_second",
    "router/load_imbalance",
)
"""By which the HPARAMS page sorts runs."""


class TensorBoardFiles:
    """Writes one run's event files into a folder; several writers after each other continue the same curves."""

    def __init__(self, folder: Path, config: RunConfig, *, start_step: int = 0) -> None:
        """Open a new event file for a run that goes on after ``start_step`` steps.

        What earlier files hold of later steps is void from here on: TensorBoard drops it when it reads this file.
        """
        self._config = config
        self._maps: dict[str, HeatMap] = {}
        self._next_images = start_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        self._writer.add_custom_scalars(chart_layout(config))
        self._writer.add_text("config", f"```yaml\n{config_to_yaml(config)}```", start_step)
        self._writer.add_text("sparsity plan", plan_table(SparsityPlan.from_config(config.model)), start_step)
        self._writer.flush()

    def write(self, step: int, metrics: Mapping[str, float], stats: Stats) -> None:
        """Add one logged step; of the values by layer only those that are charted, heat maps and histograms
        where they are due."""
        for name, value in metrics.items():
            if not is_layer_name(name) or metric_of(name).layers == "chart":
                self._writer.add_scalar(name, value, step)
        for name, flops in _COSTS.items():
            if flops in metrics and "train/lm_loss" in metrics:
                # The step of these curves is what the run has cost so far: two runs lie over each other at equal cost.
                self._writer.add_scalar(name, metrics["train/lm_loss"], round(metrics[flops] / 1e9))
        if self._config.metrics.image_interval and step >= self._next_images:
            self._next_images = step + self._config.metrics.image_interval
            self._draw(step, stats)
            self._count(step, stats)
        self._writer.flush()

    def write_summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the settings and the last value of each metric, which the HPARAMS page sorts runs by."""
        last = {name: value for name, value in metrics.items() if name in SUMMARY_METRICS}
        self._writer.add_hparams(hyperparameters(self._config), last, run_name=".", global_step=step)

    def _draw(self, step: int, stats: Stats) -> None:
        model = self._config.model
        for name, values_LE in heat_maps(stats).items():
            if name not in self._maps:
                scale = scale_of(name, model.moe.num_experts)
                self._maps[name] = HeatMap(scale, moe_layers(model), model.moe.num_experts)
            picture = self._maps[name].draw(values_LE, step)
            self._writer.add_image(f"experts/{name}", picture, step, dataformats="HWC")

    def _count(self, step: int, stats: Stats) -> None:
        for name, counts_LH, layers, bins in histograms(stats, self._config.model):
            for layer, counts_H in zip(layers, counts_LH, strict=True):
                add_histogram(self._writer, layer_name(name, layer), counts_H, bins, step)

    def close(self) -> None:
        """Close the event file; nothing can be written after."""
        self._writer.close()


def plan_table(plan: SparsityPlan) -> str:
    """S by layer and site as a Markdown table; a range where the experts differ."""
    layers = sorted({layer for layer, _ in plan.values})
    sites = list(dict.fromkeys(site for _, site in plan.values))
    rows = [["layer", *sites], ["---"] * (len(sites) + 1)]
    for layer in layers:
        rows.append([str(layer), *(_told(plan.values.get((layer, site), ())) for site in sites)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _told(values: Sequence[float]) -> str:
    if not values:
        return "–"
    least, most = min(values), max(values)
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"


def hyperparameters(config: RunConfig) -> dict[str, float | str | bool]:
    """What an ablation varies, by dotted path."""
    model, moe, sparsity, training = config.model, config.model.moe, config.model.sparsity, config.training
    return {
        "model.hidden_size": model.hidden_size,
        "model.num_layers": model.num_layers,
        "model.moe.num_experts": moe.num_experts,
        "model.moe.experts_per_token": moe.experts_per_token,
        "model.moe.expert_hidden_size": moe.expert_hidden_size,
        "model.moe.router": moe.router,
        "model.moe.activation": moe.activation,
        "mean S": SparsityPlan.from_config(model).mean,
        "model.sparsity.selection": sparsity.selection,
        "model.sparsity.gradient": sparsity.gradient,
        "model.sparsity.rescale": sparsity.rescale,
        "model.sparsity.quantization.weights": sparsity.quantization.weights,
        "training.learning_rate": training.learning_rate,
        "training.steps": training.steps,
        "training.seed": training.seed,
    }
