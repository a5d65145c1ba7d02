"""The memory of one rank under a layout, by part: on the device and in host memory; at build, in a step, while saving.

The counts are those of this package's engines and of DeepSpeed 0.19 behind them. N ranks, P ranks of an
expert-parallel group, n elements that a rank computes with, s elements whose optimizer state it keeps (``share``), w
bytes of a value in the precision of the run; E experts, A experts per token, D width, F hidden width, T tokens.

- The plain engine and ZeRO-0 replicate everything; in half precision they keep fp32 masters.
- ZeRO-1 and 2 keep the weights in one flat tensor (w n) and always a master copy of the share (4 s), in fp32 too.
  ZeRO-1 sums whole gradients in fp32 (4 n) and cuts them in the update; ZeRO-2 keeps the sums of the share (4 s).
  In bf16 DeepSpeed has another optimizer for ZeRO-1, which keeps both the sums (4 n) and the last gradients (2 n).
- ZeRO-3 keeps the share of weights (w s), masters and gradient sums (4 s each); ``zero3_gathers`` says which weights
  it gathers. In the update the sums of gradients are copied once more (4 s).
- A reduction has a buffer of ``reduce_bucket_size`` elements, however small the model, twice with
  ``overlap_communication``, and copies of what it reduces.

The peak of a step is the largest of three moments: the loss, when all activations of a micro-batch are held; the
backward pass of a layer, which adds gradients and their reduction; and the update.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsparse_moe.accounting.activations import activation_memory, layer_work, logits_memory
from qsparse_moe.accounting.experts_per_token import most_experts
from qsparse_moe.accounting.layout_counts import FP32, LayoutCounts, layout_counts
from qsparse_moe.accounting.zero3_gathers import zero3_gathers
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites, moe_layers, site_width

_MOMENTS = 2 * FP32
_SITE_SUMS = 8 * 8
SUB_GROUP = 1_000_000_000
"""``sub_group_size`` of ``training/engines/deepspeed_config.py``."""
_ALL_REDUCED = 500_000_000
"""Elements that DeepSpeed flattens at once where it reduces without buckets."""
_NVME_BUFFERS = 4
_NVME_WEIGHT_BUFFERS = 5


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. The parts are those of the moment of the step that needs most of the device."""

    weights: float
    gradients: float
    optimizer: float
    """fp32 masters and Adam's moments."""
    buckets: float
    """Buffers of reductions, and the copies that they make."""
    gathered: float
    """Weights that ZeRO-3 has gathered."""
    activations: float
    """Saved for the backward pass, with what one layer recomputes and computes with."""
    logits: float
    """Logits and what the loss makes of them."""
    exchange: float
    """Buffers of routed tokens on their way to the ranks of their experts and back."""
    metrics: float
    """Sums that logged steps report."""
    build: float
    """Peak on the device while the engine is built."""
    save: float
    """Peak on the device while a checkpoint is saved."""
    host_state: float
    """In host memory: what offload keeps there, and its buffers."""
    host_snapshot: float
    """In host memory: the buffer from which checkpoints are written, for the rank's share of weights and moments."""
    nvme: float
    """In files on a local disk."""
    moment: str
    """The moment of a step that needs most: loss, backward or update."""

    @property
    def step(self) -> float:
        """Peak on the device in a step."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def device(self) -> float:
        """Peak on the device."""
        return max(self.build, self.step, self.save)

    @property
    def host(self) -> float:
        """Peak in host memory, beside the process itself and its data."""
        return self.host_state + self.host_snapshot

    def parts(self) -> dict[str, float]:
        """Return the parts of the step's peak by name."""
        return {part: getattr(self, part) for part in PARTS}


PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "buckets",
    "gathered",
    "activations",
    "logits",
    "exchange",
    "metrics",
)


@dataclass(frozen=True)
class _State:
    """Bytes held between two steps, by place."""

    weights: float
    optimizer: float
    gradients: float
    buckets: float
    host: float
    nvme: float

    @property
    def device(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.buckets


def rank_memory(config: RunConfig, ranks: int) -> RankMemory:
    """Return the memory of the rank that needs most of ``ranks`` ranks."""
    counts = layout_counts(config, ranks)
    state = _state(config, counts)
    moments = _moments(config, ranks, counts, state)
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    extra = moments[name]
    return RankMemory(
        weights=state.weights,
        gradients=state.gradients + extra["gradients"],
        optimizer=state.optimizer,
        buckets=state.buckets + extra["buckets"],
        gathered=extra["gathered"],
        activations=extra["activations"],
        logits=extra["logits"],
        exchange=extra["exchange"],
        metrics=_metrics(config),
        build=_build(counts, state),
        save=state.device,
        host_state=state.host,
        # In fp32 whatever the precision: a checkpoint has the masters and both moments of every element once.
        host_snapshot=(FP32 + _MOMENTS) * counts.share if config.training.checkpoint_async else 0.0,
        nvme=state.nvme,
        moment=name,
    )


def checkpoint_bytes(config: RunConfig) -> float:
    """Return the size of one checkpoint: weights and moments in fp32."""
    counts = layout_counts(config, 1)
    return (FP32 + _MOMENTS) * counts.share


def _state(config: RunConfig, counts: LayoutCounts) -> _State:
    if counts.stage == 0:
        masters = FP32 * counts.local if counts.width != FP32 else 0.0
        return _State(counts.width * counts.local, masters + _MOMENTS * counts.local, 0.0, 0.0, 0.0, 0.0)
    chosen = config.training.deepspeed
    weights = counts.width * (counts.share if counts.stage == 3 else counts.local)
    optimizer = (FP32 + _MOMENTS) * counts.share
    # ZeRO-3 keeps the sums of gradients from one step to the next, and its bucket is always in the dtype of reductions.
    gradients = FP32 * counts.share if counts.stage == 3 else 0.0
    if _keeps_sums(config, counts):
        gradients = (FP32 + counts.width) * counts.local
    bucket = FP32 * chosen.reduce_bucket_size if counts.stage == 3 else 0.0
    host = nvme = 0.0
    if chosen.offload_optimizer != "none":
        # The gradient goes to the host as well; ZeRO-1 and 2 copy the updated weights through a buffer, and ZeRO-3
        # keeps a second gradient buffer beside its sums.
        more = counts.width if counts.stage < 3 else FP32
        moved = optimizer + FP32 * counts.share
        host, gradients = more * counts.share, 0.0
        # ZeRO-1 and 2 restore a sum of gradients in a tensor of the largest parameter, one on the device.
        bucket += counts.width * counts.largest if counts.stage < 3 else 0.0
        host += 2 * counts.width * counts.largest if counts.stage < 3 else 0.0
        # Where there are several micro-batches, their sums are kept in the precision of the run.
        host += counts.width * counts.share if counts.stage < 3 else 0.0
        if chosen.offload_optimizer == "nvme":
            nvme += optimizer
            host += moved - optimizer + _NVME_BUFFERS * FP32 * min(counts.share, SUB_GROUP)
        else:
            host += moved
        optimizer = 0.0
    if chosen.offload_parameters == "cpu":
        host, weights = host + weights, 0.0
    elif chosen.offload_parameters == "nvme":
        buffers = _NVME_WEIGHT_BUFFERS * counts.width * counts.largest * counts.share / counts.local
        host, nvme, weights = host + buffers, nvme + weights, 0.0
    return _State(weights, optimizer, gradients, bucket, host, nvme)


def _keeps_sums(config: RunConfig, counts: LayoutCounts) -> bool:
    """Return whether the optimizer is DeepSpeed's for ZeRO-1 in bf16, which offload does not use."""
    training = config.training
    is_bf16 = training.precision == "bf16"
    return counts.stage == 1 and is_bf16 and training.deepspeed.offload_optimizer == "none"


def _build(counts: LayoutCounts, state: _State) -> float:
    """Return the peak of the build: weights are drawn in the dtype of the run, at ZeRO-3 one parameter at a time."""
    if counts.stage in (1, 2):
        # Flattened while the parameters still exist.
        return max(state.device, 2 * counts.width * counts.local)
    drawn = FP32 * counts.largest if counts.stage == 3 else 0.0
    return state.device + drawn


def _moments(config: RunConfig, ranks: int, counts: LayoutCounts, state: _State) -> dict[str, dict[str, float]]:
    """Return what each moment of a step needs beyond the state, by part."""
    activations = activation_memory(config)
    logits = logits_memory(config)
    # The log-probabilities are counted with the logits here.
    saved = activations.saved - activations.log_probabilities
    gathered = counts.width * zero3_gathers(config, ranks).most_live if counts.stage == 3 else 0.0
    exchange = _exchange(config)
    earlier, whole = _gradient_sums(config, counts)
    work, reduction = layer_work(config), _reduction(config, counts)
    held = {"gathered": gathered, "exchange": exchange}
    nothing = {"gradients": 0.0, "buckets": 0.0, "gathered": 0.0, "activations": 0.0, "logits": 0.0, "exchange": 0.0}
    loss = held | {
        "gradients": earlier,
        "buckets": _bucket(config, counts),
        "activations": saved,
        "logits": logits.peak,
    }
    backward = held | {
        "gradients": earlier + counts.width * counts.largest,
        "buckets": reduction,
        "activations": saved + activations.recomputed + work,
        "logits": logits.kept,
    }
    # At the end of the backward pass all gradients exist and the activations are gone.
    last = {"gradients": whole, "buckets": reduction, "activations": activations.recomputed + work}
    update = {"gradients": whole + _update_copies(config, counts), "buckets": _bucket(config, counts)}
    return {
        "loss": nothing | loss,
        "backward": max(nothing | backward, nothing | held | last, key=lambda parts: sum(parts.values())),
        "update": nothing | update,
    }


def _gradient_sums(config: RunConfig, counts: LayoutCounts) -> tuple[float, float]:
    """Return the bytes of gradients before the last micro-batch, if there are several, and after it."""
    training = config.training
    offloads = training.deepspeed.offload_optimizer != "none" and counts.stage > 0
    if counts.stage == 3 or _keeps_sums(config, counts):
        return 0.0, 0.0
    if counts.stage == 2:
        sums = 0.0 if offloads else FP32 * counts.share
        return sums, sums
    return FP32 * counts.local, FP32 * counts.local


def _bucket(config: RunConfig, counts: LayoutCounts) -> float:
    """Return the bytes of the buffers that ZeRO-1 and 2 allocate in every backward pass."""
    if counts.stage not in (1, 2) or _keeps_sums(config, counts):
        return 0.0
    chosen = config.training.deepspeed
    # ZeRO-1 reduces the fp32 sums, ZeRO-2 collects gradients in the precision of the run.
    width = FP32 if counts.stage == 1 else counts.width
    return width * chosen.reduce_bucket_size * (2 if chosen.overlap_communication else 1)


def _reduction(config: RunConfig, counts: LayoutCounts) -> float:
    """Return the bytes of the buffers of a reduction and of the copies that are sent, in fp32."""
    if counts.stage == 0:
        return 0.0
    if _keeps_sums(config, counts):
        return FP32 * min(counts.local, _ALL_REDUCED)
    size = min(max(config.training.deepspeed.reduce_bucket_size, counts.largest), counts.local)
    # ZeRO-1 flattens the bucket once; in half precision, and at ZeRO-3, it is converted as well.
    copies = 1 if counts.stage == 1 or (counts.width == FP32 and counts.stage == 2) else 2
    return _bucket(config, counts) + copies * FP32 * size


def _update_copies(config: RunConfig, counts: LayoutCounts) -> float:
    """Return the bytes of the copies of the share's gradient that the update makes."""
    if counts.stage == 0 or config.training.deepspeed.offload_optimizer != "none" or _keeps_sums(config, counts):
        return 0.0
    # ZeRO-1 cuts its share out of the sums, and in fp32 flattens it in a second copy; so does ZeRO-2.
    copies = {1: 1 if counts.width != FP32 else 2, 2: 0 if counts.width != FP32 else 1, 3: 1}[counts.stage]
    # ZeRO-3 updates groups of this size one after the other.
    size = min(counts.share, SUB_GROUP) if counts.stage == 3 else counts.share
    return copies * FP32 * size


def _exchange(config: RunConfig) -> float:
    """Return the bytes of sent and received rows while a layer exchanges them, at even load."""
    model, training = config.model, config.training
    if training.expert_parallel_size == 1 or not moe_layers(model):
        return 0.0
    rows = training.micro_batch_size * config.data.sequence_length * max(most_experts(model).values())
    width = FP32 if training.precision == "fp32" else 2
    # What is sent, what is received, and the same sorted by expert.
    return 3.0 * rows * model.hidden_size * width


def _metrics(config: RunConfig) -> float:
    """Return the bytes of the sums of a logged step: flags per feature and expert, and fp64 sums per expert."""
    model = config.model
    total = 0
    for layer in range(model.num_layers):
        for site in layer_sites(model, layer):
            experts = model.moe.num_experts if site in EXPERT_SITES else 1
            total += experts * (site_width(model, site) + _SITE_SUMS)
    # Once in the layers' outputs, once stacked, and once as the flat tensor that is reduced.
    return 3.0 * total
