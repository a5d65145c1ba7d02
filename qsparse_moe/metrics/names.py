"""The list of all metrics: name, unit, definition. Nothing is recorded under a name that is not in it.

``SITE`` in a name is replaced by the name of a sparsity site. A metric of the layers is recorded as its mean over the
layers that have it (``train/grad_norm``: as the norm of all parameters) and, with ``/layer_I`` after the name, for each
of these layers. ``python -m qsparse_moe.metrics.table`` writes the table in ``docs/metrics.md`` from this list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qsparse_moe.config.schema import SITES


@dataclass(frozen=True)
class Metric:
    """A quantity that a run records."""

    name: str
    unit: str
    definition: str
    layers: Literal["none", "file", "chart"] = "none"
    """Destination of its values by layer: none, metrics.jsonl, or TensorBoard as well."""
    # Few are "chart": TensorBoard becomes slow with thousands of tags, and a deep model should stay below one thousand.
    kind: Literal["scalar", "curve", "histogram", "image", "evaluated"] = "scalar"
    """Scalars are in both files. Curves over a cost, histograms by layer, and images are in TensorBoard only.
    ``evaluate`` writes what is evaluated, after training, to TensorBoard and to a JSON file."""


METRICS = (
    Metric(
        "train/loss",
        "nats per token",
        "The training objective: lm_loss plus each auxiliary loss times its coefficient.",
    ),
    Metric("train/lm_loss", "nats per token", "Cross-entropy of the next token over the step's global batch."),
    Metric(
        "train/load_balance_loss",
        "1",
        "Load-balance loss before its coefficient, mean over the MoE layers; 1 at even load, E if one expert "
        "receives every token.",
    ),
    Metric(
        "train/router_z_loss",
        "1",
        "Mean square of the logarithm of the router's partition function, before its coefficient, mean over "
        "the MoE layers.",
    ),
    Metric(
        "train/grad_norm",
        "1",
        "L2 norm of the whole gradient before clipping. Per layer, with metrics.layer_gradients: that of the "
        "layer's matrices in attention, experts, shared experts, and dense feed-forward networks. null in a "
        "step that was skipped because it is not finite.",
        layers="chart",
    ),
    Metric("train/loss_scale", "1", "Factor by which the loss is multiplied in fp16; absent in other precisions."),
    Metric(
        "train/skipped_steps",
        "steps",
        "Number of steps skipped since the start of the run, because the scaled gradient overflowed in fp16 or by "
        "training.skip_steps; absent in other precisions without that setting.",
    ),
    Metric("train/learning_rate", "1", "Learning rate of the step."),
    Metric("train/sparsity", "1", "S of the plan in this step, mean over layers, sites, and experts."),
    Metric("validation/loss", "nats per token", "Cross-entropy of the next token over the fixed validation sequences."),
    Metric("validation/perplexity", "1", "exp of validation/loss."),
    Metric(
        "validation/bits_per_byte",
        "bits per byte",
        "The same loss in bits, divided by the number of bytes of text in these sequences.",
    ),
    Metric(
        "throughput/tokens_per_second",
        "tokens per second",
        "Tokens processed by all ranks since the last logged step, divided by the time of these steps.",
    ),
    Metric(
        "throughput/step_seconds", "seconds", "Wall-clock time per step, mean over the steps since the last logged one."
    ),
    Metric(
        "throughput/rows_per_second",
        "sequences per second",
        "Sequences processed by all ranks in the same time, divided by it.",
    ),
    Metric("throughput/data_seconds", "seconds", "Time of this step that rank 0 spent waiting for data."),
    Metric("throughput/forward_seconds", "seconds", "Time of this step that rank 0 spent in forward passes."),
    Metric(
        "throughput/backward_seconds",
        "seconds",
        "Time of this step that rank 0 spent in backward passes, including the reductions of the engine in them.",
    ),
    Metric(
        "throughput/update_seconds",
        "seconds",
        "Time of this step that rank 0 spent in clipping and in the optimizer, including the engine's "
        "reductions and gathers.",
    ),
    Metric(
        "throughput/communication_seconds",
        "seconds",
        "Time of this step that rank 0 spent in collectives, including those of the report. It is part of "
        "the times above or in addition to them. Absent on CUDA, where only a profile shows it.",
    ),
    Metric(
        "throughput/checkpoint_seconds",
        "seconds",
        "Time that training on rank 0 waited for checkpoints since the last logged step: for the copy of the state and "
        "for an earlier checkpoint that was not complete yet. Absent if none was saved.",
    ),
    Metric(
        "throughput/model_flops_utilisation",
        "1",
        "FLOPs of training with routing (efficiency/training_flops_per_token) per second, divided by the "
        "peak of all devices; absent if the peak is unknown.",
    ),
    Metric("memory/resident", "bytes", "Resident memory of the process of rank 0."),
    Metric("memory/peak_resident", "bytes", "Largest resident memory so far."),
    Metric("memory/allocated", "bytes", "CUDA memory of the tensors of rank 0; absent on a CPU."),
    Metric("memory/peak_allocated", "bytes", "Largest value of it so far; absent on a CPU."),
    Metric(
        "router/load_imbalance",
        "1",
        "Routed tokens of the busiest expert divided by the mean per expert; 1 at even load.",
        layers="chart",
    ),
    Metric(
        "router/load_entropy",
        "nats",
        "Entropy of the distribution of routed tokens over the experts; ln E at even load.",
        layers="file",
    ),
    Metric(
        "router/busiest_share",
        "1",
        "Fraction of the routed tokens that the busiest expert receives; 1/E at even load.",
        layers="file",
    ),
    Metric("router/dead_experts", "experts", "Number of experts that received no token in this step.", layers="chart"),
    Metric(
        "router/dead_experts_window",
        "experts",
        "Number of experts that received no token in the last metrics.dead_expert_window / metrics.interval logged "
        "steps, rounded up; absent before there are as many, and if metrics.dead_expert_window is 0.",
        layers="file",
    ),
    Metric(
        "router/dropped_share",
        "1",
        "Fraction of the routed tokens beyond the capacity of their expert; absent without a capacity "
        "factor. The other router metrics include these tokens.",
        layers="file",
    ),
    Metric(
        "router/choice_entropy",
        "nats",
        "Entropy of the router's probabilities per token (sigmoid scores are divided by their sum), mean "
        "over the tokens; 0: certain, ln E: undecided.",
        layers="file",
    ),
    Metric(
        "router/experts_per_token",
        "experts",
        "Number of experts that a token uses, mean over the tokens: the A of the model unless the sparsity plan has "
        "fewer. Tokens that a capacity drops count.",
        layers="file",
    ),
    Metric(
        "router/first_weight",
        "1",
        "Weight of a token's first expert, including the scaling factor, mean over the tokens.",
        layers="file",
    ),
    Metric(
        "router/choice_agreement",
        "1",
        "Fraction of the routing choices of the validation tokens that are the same as in the previous evaluation; "
        "A/E by chance; absent in the first evaluation of a run.",
        layers="file",
    ),
    Metric(
        "router/bias_range",
        "1",
        "Difference between the largest and the smallest balancing bias after the step; absent without biases.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/zeros_chosen",
        "1",
        "Fraction of the features that the selection set to zero: S after rounding to whole features.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/zeros",
        "1",
        "Fraction of zeros in front of the matrix: those of the selection and those that the activation "
        "function produced.",
        layers="chart",
    ),
    Metric(
        "sparsity/SITE/kept_energy",
        "1",
        "Sum of squares after the selection divided by the sum before it, before any rescale; absent if that sum is 0.",
        layers="chart",
    ),
    Metric(
        "sparsity/SITE/overlap",
        "1",
        "Fraction of a token's non-zero features that are non-zero in the next token as well, over "
        "consecutive tokens that the same matrix reads; absent if there are none.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/threshold",
        "1",
        "Smallest selected magnitude of the features of a token, mean over the tokens.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/threshold_drift",
        "1",
        "Relative change of the threshold since the previous logged step; absent in the first one of a run.",
        layers="file",
    ),
    Metric(
        "sparsity/SITE/dead_features",
        "1",
        "Fraction of the features, over all experts, that were zero for every token in the last 10 logged steps; "
        "absent before there are as many.",
        layers="file",
    ),
    Metric(
        "efficiency/active_parameters",
        "parameters",
        "Parameters that one token uses after routing; with fewer experts per token than the model has, measured in "
        "this step.",
    ),
    Metric(
        "efficiency/kept_parameters",
        "parameters",
        "Active parameters whose input is not zero, by the zeros of this step.",
    ),
    Metric(
        "efficiency/training_flops_per_token",
        "FLOPs per token",
        "FLOPs of forward and backward with routing: what dense kernels execute, without recomputation. With fewer "
        "experts per token than the model has, those that the tokens of this step used.",
    ),
    Metric(
        "efficiency/kept_training_flops_per_token",
        "FLOPs per token",
        "The same if every zero of this step were skipped. The input gradient stays dense under the "
        "straight-through estimator. Counted, not saved.",
    ),
    Metric("efficiency/total_training_flops", "FLOPs", "FLOPs executed since the start of the run, over all ranks."),
    Metric(
        "efficiency/total_kept_training_flops",
        "FLOPs",
        "The same if every zero were skipped. The zeros of a logged step count for the steps since the previous one.",
    ),
    Metric(
        "efficiency/weight_bytes_1",
        "bytes",
        "Bytes of weights that are read to generate one token, by routing and the zeros of this step.",
    ),
    Metric(
        "efficiency/weight_bytes_16",
        "bytes",
        "Bytes of weights that are read to generate one token each for 16 independent sequences: the union "
        "of their needs.",
    ),
    Metric(
        "cost/lm_loss_by_executed_gflops",
        "nats per token",
        "train/lm_loss as a function of efficiency/total_training_flops in GFLOPs, which replace the step.",
        kind="curve",
    ),
    Metric(
        "cost/lm_loss_by_kept_gflops",
        "nats per token",
        "train/lm_loss as a function of efficiency/total_kept_training_flops in GFLOPs, which replace the step.",
        kind="curve",
    ),
    Metric(
        "router/log2_probability",
        "log2",
        "Histogram of the base-2 logarithm of the router's probabilities, over all tokens and experts, in "
        "bins of 1/8 from -20 to 0; smaller values count in the first bin.",
        kind="histogram",
    ),
    Metric(
        "sparsity/SITE/log2_threshold",
        "log2",
        "Histogram of the base-2 logarithm of the smallest selected magnitude per token, in bins of 1/8 from -24 to 8.",
        kind="histogram",
    ),
    Metric(
        "experts/load",
        "1",
        "Heat map of layers by experts: routed tokens of an expert divided by the mean of its layer.",
        kind="image",
    ),
    Metric(
        "sparsity_by_expert/SITE/kept_energy",
        "1",
        "Heat map of layers by experts: sum of squares after the selection divided by the sum before it, at "
        "expert_input and expert_hidden.",
        kind="image",
    ),
    Metric(
        "sparsity_by_expert/SITE/zeros",
        "1",
        "Heat map of layers by experts: fraction of zeros in front of the matrix of the expert.",
        kind="image",
    ),
    Metric(
        "sparsity_by_expert/SITE/unused_features",
        "1",
        "Heat map of layers by experts: fraction of the features that were zero for every token of the step.",
        kind="image",
    ),
    Metric(
        "tasks/TASK/METRIC",
        "of the task",
        "Score of a task of lm-evaluation-harness (evaluate --tasks).",
        kind="evaluated",
    ),
    Metric(
        "comparison/kl_divergence",
        "nats per token",
        "Kullback-Leibler divergence of the model's next-token distribution from that of the reference "
        "(evaluate --compare), mean over the held-out tokens; 0 if they are the same.",
        kind="evaluated",
    ),
    Metric(
        "comparison/top1_agreement",
        "1",
        "Fraction of the held-out tokens after which model and reference have the same likeliest token.",
        kind="evaluated",
    ),
    Metric(
        "comparison/choices_changed",
        "1",
        "Fraction of the reference's routing choices (A per token) that the model does not make.",
        layers="chart",
        kind="evaluated",
    ),
    Metric(
        "comparison/first_choice_changed",
        "1",
        "Fraction of the tokens whose first expert is another than in the reference.",
        layers="chart",
        kind="evaluated",
    ),
    Metric(
        "comparison/choices_changed_locally",
        "1",
        "The same as comparison/choices_changed if every layer of the model reads the hidden states of the reference: "
        "changes that the layer itself causes.",
        layers="chart",
        kind="evaluated",
    ),
    Metric(
        "comparison/hidden_error",
        "1",
        "Norm of the difference of the hidden states after a layer over the norm of those of the reference, mean over "
        "the tokens.",
        layers="chart",
        kind="evaluated",
    ),
    Metric(
        "comparison/hidden_cosine",
        "1",
        "Cosine of the hidden states after a layer and those of the reference, mean over the tokens.",
        layers="chart",
        kind="evaluated",
    ),
    Metric(
        "comparison/greedy_agreement",
        "1",
        "Fraction of the tokens of greedy continuations that are the same as in those of the reference, over the "
        "positions that both have; also by position, which then replaces the step.",
        kind="evaluated",
    ),
    Metric(
        "comparison/never_parts",
        "1",
        "Fraction of the prompts whose greedy continuation is that of the reference to the end.",
        kind="evaluated",
    ),
    Metric(
        "comparison/drift_agreement",
        "1",
        "Fraction of the tokens of the model's own greedy continuations that the reference would choose after the same "
        "tokens; also by position, which then replaces the step.",
        kind="evaluated",
    ),
    Metric(
        "comparison/drift_log_probability",
        "nats per token",
        "Log-probability of the tokens of the model's own greedy continuations under the reference, mean over the "
        "tokens; also by position, which then replaces the step.",
        kind="evaluated",
    ),
    Metric(
        "comparison/choices_lost",
        "1",
        "Heat map of layers by experts: fraction of the reference's choices of an expert that the model does not make.",
        kind="image",
    ),
    Metric(
        "comparison/choices_gained",
        "1",
        "Heat map of layers by experts: choices of an expert that only the model makes, over the reference's choices "
        "of it.",
        kind="image",
    ),
)

# The other kinds are never in a logged step, so only scalars are valid recorded names.
_BY_NAME = {metric.name: metric for metric in METRICS if metric.kind == "scalar"}
_BY_TAG = {metric.name: metric for metric in METRICS}
_LAYER = re.compile(r"/layer_[0-9]+$")
_SITE = re.compile(rf"^(sparsity|sparsity_by_expert)/(?:{'|'.join(SITES)})/")
_TASK = re.compile(r"^tasks/.+")


def layer_name(name: str, layer: int) -> str:
    """Return the name under which the metric ``name`` of one layer, counted from 0, is recorded."""
    return f"{name}/layer_{layer}"


def is_layer_name(name: str) -> bool:
    """Return whether ``name`` is the name of a value of one layer."""
    return _LAYER.search(name) is not None


def is_listed(name: str) -> bool:
    """Return whether the recorded ``name`` belongs to a scalar of the list."""
    return _listed_name(name) in _BY_NAME


def metric_of(name: str) -> Metric:
    """Return the entry of the list that a recorded ``name`` belongs to.

    Raises:
        KeyError: the list has no scalar of that name.
    """
    return _BY_NAME[_listed_name(name)]


def describe_tag(name: str) -> str:
    """Return the unit and the definition of the metric of any kind that the tag ``name`` belongs to."""
    metric = _BY_TAG[_listed_name(name)]
    return f"**Unit: {metric.unit}.** {metric.definition}"


def _listed_name(name: str) -> str:
    return _TASK.sub("tasks/TASK/METRIC", _SITE.sub(r"\1/SITE/", _LAYER.sub("", name)))
