"""Event files for TensorBoard: scalars, pictures, histograms, and the configuration of a run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import DataClass, Summary, SummaryMetadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams, image

from qsparse_moe.config.fields import value_of
from qsparse_moe.config.labels import OVERRIDES, setting_label
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.metrics.charts import chart_layout
from qsparse_moe.metrics.heatmaps import HeatMap, Pixels, heat_maps, scale_of
from qsparse_moe.metrics.histograms import histogram_summary, histograms
from qsparse_moe.metrics.names import describe_tag, is_layer_name, layer_name, metric_of
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.stats import Stats

_COSTS = {
    "cost/lm_loss_by_executed_gflops": "efficiency/total_training_flops",
    "cost/lm_loss_by_kept_gflops": "efficiency/total_kept_training_flops",
}
"""Curves over a cost instead of the step, with the metric that is the cost."""
_DATA_CLASSES = {
    "scalars": DataClass.DATA_CLASS_SCALAR,
    "images": DataClass.DATA_CLASS_BLOB_SEQUENCE,
    "histograms": DataClass.DATA_CLASS_TENSOR,
}
_COST_RUN = "cost"
"""Folder of those curves within the run's TensorBoard folder; TensorBoard lists it as a run of its own."""
VALIDATION_RUN = "validation"
"""Folder of the metrics ``validation/...``. TensorBoard has one colour per run, so they are a run of their own:
train and validation loss then have two colours in one chart."""
_VALIDATION = "validation/"
SUMMARY_METRICS = (
    "validation/bits_per_byte",
    "train/lm_loss",
    "efficiency/active_parameters",
    "efficiency/kept_parameters",
    "efficiency/total_training_flops",
    "throughput/tokens_per_second",
    "router/load_imbalance",
)
"""Final metrics that the HPARAMS page lists per run: the last value of each of these curves."""


class TensorBoardFiles:
    """Writes the event files of one run into a folder. A resumed run opens new files that continue the same curves."""

    def __init__(
        self, folder: Path, config: RunConfig, *, start_step: int = 0, before: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Open new event files for a run that continues after ``start_step`` steps.

        They void the later steps of earlier files: TensorBoard drops these steps when it reads the new file.
        ``before`` are the logged steps of the run up to there; the curves over a cost are written again from them.
        """
        self._config = config
        self._maps: dict[str, HeatMap] = {}
        self._described: set[str] = set()
        self._last: tuple[int, Stats] | None = None
        self._drawn = start_step
        self._summaries = _hparams_summaries(config)
        self._writer = _open(folder, start_step)
        self._writer.add_custom_scalars(chart_layout(config))
        self._writer.add_text("config", f"```yaml\n{config_to_yaml(config)}```", start_step)
        self._writer.add_text("sparsity plan", plan_table(SparsityPlan.from_config(config.model)), start_step)
        self._write_hyperparameters(start_step)
        # The x of these points is not a step, so a reader cannot know which of them are void. They are in a file of
        # their own, which is written again at every resume.
        shutil.rmtree(folder / _COST_RUN, ignore_errors=True)
        self._cost_writer = SummaryWriter(str(folder / _COST_RUN))
        for row in before:
            self._write_costs(row)
        self._open_validation(folder / VALIDATION_RUN, start_step, before)
        self._flush()

    def _open_validation(self, folder: Path, start_step: int, before: Sequence[Mapping[str, Any]]) -> None:
        # Runs of earlier versions have these curves in the run itself. After a resume they are complete here as well.
        is_new = not any(folder.glob("events.out.tfevents.*"))
        self._validation_writer = _open(folder, start_step)
        # Only into a new folder, because an event file that exists already has these points.
        for row in before if is_new else ():
            for name, value in row.items():
                if name.startswith(_VALIDATION):
                    self._add_scalar(self._validation_writer, name, value, row["step"])

    def write(self, step: int, metrics: Mapping[str, float], stats: Stats, *, images: bool) -> None:
        """Add one logged step, with ``images`` its heat maps and histograms too."""
        self._add_scalars(step, metrics)
        self._write_costs(metrics)
        self._last = step, stats
        if images:
            self._write_images(step, stats)
        self._flush()

    def write_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add values to a step that was written before; of the values by layer only those that are charted."""
        self._add_scalars(step, metrics)
        self._flush()

    def _add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if not is_layer_name(name) or metric_of(name).layers == "chart":
                # By name, not by a list: every metric of an evaluation belongs to one run and has one colour.
                writer = self._validation_writer if name.startswith(_VALIDATION) else self._writer
                self._add_scalar(writer, name, value, step)

    def write_end(self, step: int) -> None:
        """Draw the last logged step unless it was drawn, and write the end of the run, which the HPARAMS page shows."""
        if self._config.metrics.image_interval and self._last is not None and self._last[0] != self._drawn:
            self._write_images(*self._last)
        _add_summary(self._writer, self._summaries[2], step)

    def _add_scalar(self, writer: SummaryWriter, name: str, value: float | None, step: int) -> None:
        # None is how metrics.jsonl stores NaN and infinity.
        number = float("nan") if value is None else float(value)
        summary = Summary(value=[Summary.Value(tag=name, simple_value=number)])
        self._add_described(writer, "scalars", summary, step)

    def _add_described(self, writer: SummaryWriter, plugin: str, summary: Any, step: int) -> None:
        add_described(writer, plugin, summary, step, self._described)

    def _write_images(self, step: int, stats: Stats) -> None:
        self._drawn = step
        self._draw(step, stats)
        self._count(step, stats)

    def _write_hyperparameters(self, step: int) -> None:
        # In the folder of the run and at its start, so that a killed or resumed run is one row of the page as well.
        # Every run names the same columns, because TensorBoard takes them from the first run that it finds.
        for summary in self._summaries[:2]:
            _add_summary(self._writer, summary, step)

    def _write_costs(self, metrics: Mapping[str, float | None]) -> None:
        # The cost so far takes the place of the step, so that the curves of two runs compare at equal cost.
        for name, flops in _COSTS.items():
            cost, loss = metrics.get(flops), metrics.get("train/lm_loss")
            if cost is not None and loss is not None:
                # In GFLOPs because TensorBoard's steps are 64-bit integers, which the FLOPs of a large run exceed.
                self._add_scalar(self._cost_writer, name, loss, round(cost / 1e9))

    def _draw(self, step: int, stats: Stats) -> None:
        model = self._config.model
        for name, values_LE in heat_maps(stats).items():
            if name not in self._maps:
                # The frame of a map is drawn once and used in every step.
                scale = scale_of(name, model.moe.num_experts)
                self._maps[name] = HeatMap(scale, moe_layers(model), model.moe.num_experts)
            picture = self._maps[name].draw(values_LE)
            self._add_described(self._writer, "images", image(image_tag(name), picture, dataformats="HWC"), step)

    def _count(self, step: int, stats: Stats) -> None:
        for name, counts_LH, layers, bins in histograms(stats, self._config.model):
            for layer, counts_H in zip(layers, counts_LH, strict=True):
                summary = histogram_summary(layer_name(name, layer), counts_H, bins)
                if summary is not None:
                    self._add_described(self._writer, "histograms", summary, step)

    def _flush(self) -> None:
        for writer in (self._writer, self._validation_writer, self._cost_writer):
            writer.flush()

    def close(self) -> None:
        """Close the event files; nothing can be written afterwards."""
        for writer in (self._writer, self._validation_writer, self._cost_writer):
            writer.close()


def _open(folder: Path, start_step: int) -> SummaryWriter:
    """Open a new event file that voids what earlier files of ``folder`` hold of the steps after ``start_step``."""
    _wait_for_a_later_name(folder)
    # Readers drop the steps from purge_step on, so the step of the checkpoint itself stays.
    return SummaryWriter(str(folder), purge_step=start_step + 1)


def add_described(writer: SummaryWriter, plugin: str, summary: Any, step: int, described: set[str]) -> None:
    """Add the value of one tag, with the unit and the definition for its card unless the tag is in ``described``.

    ``SummaryWriter`` writes no descriptions. TensorBoard takes them from the first value of a tag in a file.
    """
    (value,) = summary.value
    if value.tag not in described:
        described.add(value.tag)
        # Without the class of the data, TensorBoard's fast reader replaces the metadata, description included.
        value.metadata.CopyFrom(
            SummaryMetadata(
                summary_description=describe_tag(value.tag),
                plugin_data=SummaryMetadata.PluginData(plugin_name=plugin),
                data_class=_DATA_CLASSES[plugin],
            )
        )
    _add_summary(writer, summary, step)


def _add_summary(writer: SummaryWriter, summary: Any, step: int) -> None:
    file_writer = writer.file_writer
    assert file_writer is not None, "the event file is closed"
    file_writer.add_summary(summary, step)


def image_tag(name: str) -> str:
    """Return the tag of the heat map ``name`` of ``heatmaps.heat_maps``.

    TensorBoard sorts the Images page by tag, with several runs a page or more per group. The load comes first because
    its group, ``experts``, comes before the group of the maps of the sites, which are constant under exact top-K.
    """
    return f"experts/{name}" if name == "load" else f"sparsity_by_expert/{name}"


def _hparams_summaries(config: RunConfig) -> tuple[Any, Any, Any]:
    """Return the summaries of the experiment, of the start, and of the end of a session for the HPARAMS page."""
    # The zeros are not written anywhere: the page reads the last value of each metric's curve.
    experiment, start, end = hparams(hyperparameters(config), dict.fromkeys(SUMMARY_METRICS, 0.0))
    (value,) = experiment.value
    data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
    for info in data.experiment.metric_infos:
        if info.name.tag.startswith(_VALIDATION):
            # The page searches a metric in the folder of the session unless its group names a folder below it.
            info.display_name, info.name.group = info.name.tag, VALIDATION_RUN
    value.metadata.plugin_data.content = data.SerializeToString()
    return experiment, start, end


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait, less than a second, until the name of a new event file sorts after those in ``folder``.

    Readers take the files in the order of their names, which contain the second in which they were made and end with a
    counter of the process. Within one second, file 10 sorts before file 9, and the steps that it voids would come back.
    """
    newest = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    if newest >= int(time.time()):
        # At most a second: a file from a machine whose clock is ahead would make the run wait for as long.
        time.sleep(min(1.0, max(0.0, newest + 1 - time.time())))


def write_pictures(folder: Path, pictures: Mapping[str, Pixels], step: int) -> None:
    """Add pictures ``(height, width, 3)`` by name, in an event file of their own in the folder of the run.

    The names have the form ``GROUP/NAME``. An earlier file of the same groups is replaced, so that a report that is
    written again has every picture once.
    """
    # The suffix distinguishes the file from the run's own. Without a purge_step the curves of the run stay as they are.
    suffix = "".join(f".{group}" for group in sorted({name.partition("/")[0] for name in pictures})) + ".pictures"
    before = list(folder.glob(f"events.out.tfevents.*{suffix}"))
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for name, picture in pictures.items():
            writer.add_image(name, picture, step, dataformats="HWC")
    for file in before:
        file.unlink(missing_ok=True)


def plan_table(plan: SparsityPlan) -> str:
    """Return S by layer and site as a Markdown table, with a range where the experts differ.

    Experts per token and ``top_p`` have columns if the plan sets them in some layer.
    """
    layers = sorted({layer for layer, _ in plan.values})
    sites = list(dict.fromkeys(site for _, site in plan.values))
    routing = {"experts_per_token": plan.experts_per_token, "top_p": plan.top_p}
    given = {name: by_layer for name, by_layer in routing.items() if by_layer}
    rows = [["layer", *sites, *given], ["---"] * (len(sites) + 1 + len(given))]
    for layer in layers:
        of_sites = [_range_text(plan.values.get((layer, site), ())) for site in sites]
        rows.append([str(layer), *of_sites, *(str(own.get(layer, "–")) for own in given.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _range_text(values: Sequence[float]) -> str:
    if not values:
        return "–"
    least, most = min(values), max(values)
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"


_COLUMNS = (
    "model.hidden_size",
    "model.num_layers",
    "model.moe.num_experts",
    "model.moe.experts_per_token",
    "model.moe.expert_hidden_size",
    "model.moe.num_shared_experts",
    "model.moe.router",
    "model.moe.activation",
    "model.sparsity.selection",
    "model.sparsity.gradient",
    "model.sparsity.rescale",
    "model.sparsity.quantization.weights",
    "training.learning_rate",
    "training.global_batch_size",
    "training.seed",
)


def hyperparameters(config: RunConfig) -> dict[str, float | str | bool]:
    """Return the settings for the HPARAMS page, named by the end of their path; S is the mean of the plan.

    The page cuts long names. Settings that a resumed run may change are left out, because TensorBoard keeps the first
    value.
    """
    named: dict[str, float | str | bool] = {"S": SparsityPlan.from_config(config.model).mean}
    always: tuple[str, ...] = _COLUMNS
    if config.metrics.variant is not None:
        # The other runs of the page belong to the same grid, which names the columns.
        named, always = {"variant": config.metrics.variant, **named}, ("training.seed",)
    for path in dict.fromkeys((*always, *config.metrics.hyperparameters)):
        parts = path.split(".")
        # The last part alone may be ambiguous ("weights"), or the same for two settings.
        name = ".".join(parts[-2:] if parts[-1] in named or parts[-2] == "quantization" else parts[-1:])
        named[name] = _shown(path, value_of(config, path))
    return named


def _shown(path: str, value: Any) -> float | str | bool:
    """Return the value for the page: numbers and texts as they are, overrides of S in words, others as JSON."""
    if path == OVERRIDES:
        return setting_label(path, value)
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
