"""The one list of metrics: name, unit, definition. Nothing is recorded under a name that does not stand here.

``SITE`` in a name stands for a sparsity site. A metric of the layers is recorded as its mean over the layers that have
it (``train/grad_norm``: as the norm of all parameters) and, with ``/layer_I`` behind the name, for every such layer.
The table in ``README.md`` and the page ``docs/metrics.md`` are made from this list by
``python -m qsparse_moe.metrics.table``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qsparse_moe.config.schema import SITES


@dataclass(frozen=True)
class Metric:
    """One quantity that a run records."""

    name: str
    unit: str
    definition: str
    layers: Literal["none", "file", "chart"] = "none"
    """Where its values by layer go: nowhere, to metrics.jsonl, or to TensorBoard as well. Few are charted by layer, so
    that a deep model stays below a thousand tags."""
    kind: Literal["scalar", "curve", "histogram", "image"] = "scalar"
    """All but scalars are in TensorBoard alone: curves whose step is a cost, histograms by layer, images."""


METRICS = (
    Metric("train/loss", "nats a token", "What is minimised: lm_loss plus each other loss times its coefficient."),
    Metric("train/lm_loss", "nats a token", "Cross-entropy of the next token over the step's global batch."),
    Metric(
        "train/load_balance_loss",
        "1",
        "Load-balance loss before its coefficient, mean over the MoE layers; 1 at even load, E if one expert has all.",
    ),
    Metric(
        "train/router_z_loss",
        "1",
        "Mean square of the log of the router's partition function, before its coefficient, mean over the MoE layers.",
    ),
    Metric(
        "train/grad_norm",
        "1",
        "L2 norm of the whole gradient before clipping; by layer, with metrics.layer_gradients, that of the layer's "
        "matrices in attention, experts, shared experts and dense feed-forwards; null in a step skipped in fp16.",
        layers="chart",
    ),
    Metric("train/loss_scale", "1", "What every micro-batch's mean loss was multiplied by; absent but in fp16."),
    Metric(
        "train/skipped_steps",
        "steps",
        "Steps skipped since the run began because the scaled gradient overflowed; absent but in fp16.",
    ),
    Metric("train/learning_rate", "1", "Learning rate of the step."),
    Metric("train/sparsity", "1", "S that the plan asks for in this step, mean over layers, sites and experts."),
    Metric("validation/loss", "nats a token", "Cross-entropy of the next token over the fixed validation rows."),
    Metric("validation/perplexity", "1", "exp of validation/loss."),
    Metric("validation/bits_per_byte", "bits a byte", "The same loss in bits, over the bytes of text in those rows."),
    Metric(
        "throughput/tokens_per_second",
        "tokens a second",
        "Tokens trained by all ranks in the steps since the last logged one, over the time of those steps.",
    ),
    Metric(
        "throughput/step_seconds", "seconds", "Wall-clock of a step, mean over the steps since the last logged one."
    ),
    Metric("throughput/rows_per_second", "rows a second", "Rows of the data trained by all ranks in the same time."),
    Metric("throughput/data_seconds", "seconds", "Of this step, rank 0: waiting for data."),
    Metric("throughput/forward_seconds", "seconds", "Of this step, rank 0: the model's forward passes."),
    Metric(
        "throughput/backward_seconds",
        "seconds",
        "Of this step, rank 0: its backward passes, and what the engine reduces over the ranks in them.",
    ),
    Metric(
        "throughput/update_seconds",
        "seconds",
        "Of this step, rank 0: clipping and optimizer, and what the engine reduces and gathers around them.",
    ),
    Metric(
        "throughput/communication_seconds",
        "seconds",
        "Of this step, rank 0: held up by collectives, those of the step's report included; lies within the parts "
        "above or beside them. Absent on CUDA, where only a profile shows it.",
    ),
    Metric(
        "throughput/model_flops_utilisation",
        "1",
        "Operations that training takes with routing (efficiency/training_flops_per_token) a second, over the peak of "
        "all devices; absent where the peak is not known.",
    ),
    Metric("memory/resident", "bytes", "Memory that the process of rank 0 occupies."),
    Metric("memory/peak_resident", "bytes", "The most that it has occupied so far."),
    Metric("memory/allocated", "bytes", "CUDA memory of rank 0's tensors; absent on a CPU."),
    Metric("memory/peak_allocated", "bytes", "The most that they have taken so far; absent on a CPU."),
    Metric(
        "router/load_imbalance",
        "1",
        "Rows of the busiest expert over the mean rows of an expert; 1 is even.",
        layers="chart",
    ),
    Metric(
        "router/load_entropy",
        "nats",
        "Entropy of the experts' shares of the rows; ln E is even.",
        layers="file",
    ),
    Metric("router/busiest_share", "1", "Share of the rows that the busiest expert gets; 1/E is even.", layers="file"),
    Metric("router/dead_experts", "experts", "Experts that got no row in this step.", layers="chart"),
    Metric(
        "router/dead_experts_window",
        "experts",
        "Experts that got no row in the last logged steps: metrics.dead_expert_window over metrics.interval of them, "
        "rounded up; absent until there are so many, and where the setting is 0.",
        layers="file",
    ),
    Metric(
        "router/dropped_share",
        "1",
        "Share of the routed rows that the capacity factor dropped, absent without one; the other router figures count "
        "those rows too.",
        layers="file",
    ),
    Metric(
        "router/choice_entropy",
        "nats",
        "Entropy of the router's probabilities for a token (of sigmoid scores: divided by their sum), mean over the "
        "tokens; 0 is certain, ln E undecided.",
        layers="file",
    ),
    Metric(
        "router/first_weight",
        "1",
        "Weight of a token's first expert, scaling factor included, mean over the tokens.",
        layers="file",
    ),
    Metric(
        "router/choice_agreement",
        "1",
        "Share of the experts that the tokens of the validation rows chose in this evaluation and in the one before; "
        "A/E by chance; absent in a process's first evaluation.",
        layers="file",
    ),
    Metric(
        "router/bias_range",
        "1",
        "Largest less smallest of the biases that balance the load, after the step; absent where there are none.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/zeros_chosen",
        "1",
        "Fraction of the features that the selection zeroed: S after rounding to whole features.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/zeros",
        "1",
        "Fraction of zeros in front of the matrix: those chosen and those that were zero by nature.",
        layers="chart",
    ),
    Metric(
        "sparsity/SITE/kept_energy",
        "1",
        "Sum of squares after the selection over the sum before, before any rescale; absent where that is 0.",
        layers="chart",
    ),
    Metric(
        "sparsity/SITE/overlap",
        "1",
        "Of the values of a token that are not zero, the share whose feature is not zero in the next token either, "
        "over tokens that one matrix reads one after the other; absent where there are none.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/threshold",
        "1",
        "Smallest magnitude that is kept of a row, mean over the rows.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/threshold_drift",
        "1",
        "Change of the threshold since the logged step before, over its value there; absent in a process's first.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/dead_features",
        "1",
        "Share of the features, over all experts, that were zero in every row of the last 10 logged steps; absent "
        "until there are so many.",
        layers="file",
    ),
    Metric("efficiency/active_parameters", "parameters", "That a token uses by routing."),
    Metric(
        "efficiency/kept_parameters",
        "parameters",
        "Those of the active whose input is not zero, by the zeros of this step.",
    ),
    Metric(
        "efficiency/training_flops_per_token",
        "FLOPs a token",
        "Forward and backward with routing: what dense kernels execute, recomputation not counted.",
    ),
    Metric(
        "efficiency/kept_training_flops_per_token",
        "FLOPs a token",
        "The same if every zero of this step were skipped; the gradient by the input stays dense under the "
        "straight-through estimator. Counted, not saved.",
    ),
    Metric("efficiency/total_training_flops", "FLOPs", "Executed since the run began, over all ranks."),
    Metric(
        "efficiency/total_kept_training_flops",
        "FLOPs",
        "The same with the zeros of the logged steps skipped, each step's standing for those before it.",
    ),
    Metric(
        "efficiency/weight_bytes_1",
        "bytes",
        "Of weights that generating one token reads, by routing and the zeros of this step.",
    ),
    Metric("efficiency/weight_bytes_16", "bytes", "The same for 16 independent tokens at once: their union."),
    Metric(
        "cost/lm_loss_by_executed_gflops",
        "nats a token",
        "train/lm_loss over efficiency/total_training_flops, in GFLOPs, in the place of the step.",
        kind="curve",
    ),
    Metric(
        "cost/lm_loss_by_kept_gflops",
        "nats a token",
        "train/lm_loss over efficiency/total_kept_training_flops, in GFLOPs, in the place of the step.",
        kind="curve",
    ),
    Metric(
        "router/log2_probability",
        "log2 of 1",
        "Histogram of the logarithm of the router's probabilities, of every token and expert, in half octaves from "
        "2^-20; what is smaller counts there.",
        kind="histogram",
    ),
    Metric(
        "sparsity/SITE/log2_threshold",
        "log2 of 1",
        "Histogram of the logarithm of the smallest magnitude that is kept of a row, in half octaves from "
        "2^-24 to 2^8.",
        kind="histogram",
    ),
    Metric("experts/load", "1", "Layers by experts: rows of an expert over the layer's mean.", kind="image"),
    Metric("experts/SITE/kept_energy", "1", "Layers by experts, expert_input and expert_hidden.", kind="image"),
    Metric("experts/SITE/zeros", "1", "The same, of the zeros in front of the expert's matrix.", kind="image"),
    Metric(
        "experts/SITE/unused_features",
        "1",
        "The same, of the share of features that were zero in every row of the step.",
        kind="image",
    ),
)

_BY_NAME = {metric.name: metric for metric in METRICS if metric.kind == "scalar"}
_BY_TAG = {metric.name: metric for metric in METRICS}
_LAYER = re.compile(r"/layer_[0-9]+$")
_SITE = re.compile(rf"^sparsity/(?:{'|'.join(SITES)})/")


def layer_name(name: str, layer: int) -> str:
    """The name under which the metric ``name`` of one layer, counted from 0, is recorded."""
    return f"{name}/layer_{layer}"


def is_layer_name(name: str) -> bool:
    """Whether ``name`` is that of one layer's value."""
    return _LAYER.search(name) is not None


def is_listed(name: str) -> bool:
    """Whether the recorded ``name`` belongs to a scalar of the list."""
    return _listed_name(name) in _BY_NAME


def metric_of(name: str) -> Metric:
    """The entry of the list that a recorded ``name`` belongs to.

    Raises:
        KeyError: no scalar of that name is in the list.
    """
    return _BY_NAME[_listed_name(name)]


def describe_tag(name: str) -> str:
    """The unit and the definition of the metric, of whatever kind, that the tag ``name`` belongs to."""
    metric = _BY_TAG[_listed_name(name)]
    return f"**Unit: {metric.unit}.** {metric.definition}"


def _listed_name(name: str) -> str:
    return _SITE.sub("sparsity/SITE/", _LAYER.sub("", name))
