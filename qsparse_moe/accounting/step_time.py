"""The time of a step by a simple model of the device, and what limits it. It is a model: nothing here is measured.

A rank's step takes the sum of

- products: the operations that dense kernels execute (zeros are multiplied too), with those that are recomputed, at
  ``PRODUCTS`` of the device's peak; or, where it takes longer, reading the weights once per product at ``MEMORY`` of
  its bandwidth, which limits experts with few tokens;
- other passes over memory: every byte of activations is written once and read ``READS`` times, forward and backward;
  the update reads and writes the optimizer's state;
- transfers to and from host memory where the state is offloaded, at the device's host link;
- the exchange of routed tokens, which layers wait for, at ``NETWORK`` of the links;
- what is left of the other collectives. They run beside the backward pass where ``overlap_communication`` is set, and
  gathers of weights beside all products; what takes longer than that is waited for.

Transfers within a node and between nodes use different links and overlap. Utilisation is the operations of the model,
without recomputation, over the step's time and the device's peak.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qsparse_moe.accounting.activations import activation_memory
from qsparse_moe.accounting.devices import Device
from qsparse_moe.accounting.flops import forward_flops, training_flops
from qsparse_moe.accounting.layout_counts import FP32, layout_counts
from qsparse_moe.accounting.layout_traffic import Sent
from qsparse_moe.config.schema import ModelConfig, RunConfig

PRODUCTS = 0.6
"""Share of the peak that large products reach; an assumption."""
MEMORY = 0.8
"""Share of the bandwidth that passes over memory reach; an assumption."""
NETWORK = 0.8
"""Share of the links' rates that collectives reach; an assumption."""
READS = 2
_UPDATE_BYTES = 28
"""Bytes of an element that AdamW reads and writes: gradient, master and two moments, of which it writes three."""
_HOST_CORES_BYTES = 20e9
"""Bytes per second and device that AdamW passes over in host memory; an assumption."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one rank, by what it does."""

    products: float
    passes: float
    update: float
    host: float
    exchange: float
    collectives: float
    """What of the other collectives does not overlap."""
    utilisation: float
    """Operations of the model per second over the peak."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.products + self.passes + self.update + self.host + self.exchange + self.collectives

    @property
    def limit(self) -> str:
        """The kind of work that takes the largest part."""
        parts = {
            "compute": self.products,
            "memory": self.passes + self.update,
            "host link": self.host,
            "network": self.exchange + self.collectives,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(config: RunConfig, ranks: int, device: Device, sent: tuple[Sent, ...]) -> StepTime:
    """Return the time of a step of ``config`` on ``ranks`` devices that send what ``sent`` says."""
    model, training, context = config.model, config.training, config.data.sequence_length
    counts = layout_counts(config, ranks)
    tokens = training.global_batch_size * context / ranks
    micro_batches = training.global_batch_size // (training.micro_batch_size * ranks)
    operations, forward = _operations(model, context)
    # A recomputed forward pass is executed once more; "selective" recomputes what is no product.
    again = {"full": 1.0, "attention": 0.25, "feed_forward": 0.75}.get(training.activation_checkpointing, 0.0)
    executed = operations + again * forward
    peak, bandwidth = device.peak_flops(training.precision), MEMORY * device.bandwidth
    # Three products read or write every weight in each micro-batch.
    weights = (3 + again) * counts.width * counts.local * micro_batches / bandwidth
    products = max(tokens * executed / (PRODUCTS * peak), weights)
    # What is recomputed passes over memory once more, also where the results of products are kept.
    activations = activation_memory(config, "none").saved * (
        2.0 if training.activation_checkpointing == "selective" else 1 + again
    )
    passes = (1 + READS) * activations * micro_batches / bandwidth
    owned = counts.local if counts.stage == 0 else counts.share
    update, host = _UPDATE_BYTES * owned / bandwidth, 0.0
    chosen = training.deepspeed
    if counts.stage and chosen.offload_optimizer != "none":
        # The gradient goes to the host and the updated weights come back.
        host = (FP32 + counts.width) * owned / device.host_link + _UPDATE_BYTES * owned / _HOST_CORES_BYTES
        update = 0.0
    if counts.stage == 3 and chosen.offload_parameters != "none":
        host += 2 * micro_batches * counts.width * owned / device.host_link
    exchange, collectives = _network(config, device, sent, products)
    total = products + passes + update + host + exchange + collectives
    return StepTime(products, passes, update, host, exchange, collectives, tokens * operations / (total * peak))


@functools.lru_cache(maxsize=64)
def _operations(model: ModelConfig, context: int) -> tuple[float, float]:
    """Return the operations per token of forward and backward, and of the forward pass."""
    forward = forward_flops(model, context).routed
    return training_flops(model, context).routed, forward


def _network(config: RunConfig, device: Device, sent: tuple[Sent, ...], products: float) -> tuple[float, float]:
    """Return the seconds of the exchange of tokens, and those of other collectives that do not overlap."""
    by_purpose = {
        purpose: sum(_seconds(device, one) for one in sent if one.purpose == purpose)
        for purpose in ("routed tokens", "gradients", "gathered weights", "updated weights")
    }
    # Two thirds of the products are in the backward pass.
    hidden = 2 / 3 * products if config.training.deepspeed.overlap_communication else 0.0
    stage = config.training.deepspeed.zero_stage if config.training.engine == "deepspeed" else 0
    if stage == 3:
        # Both share the links, and together they run beside the products.
        beside = by_purpose["gathered weights"] + by_purpose["gradients"]
        waited = max(0.0, beside - (products if hidden else products / 2))
    else:
        waited = max(0.0, by_purpose["gradients"] - hidden)
    return by_purpose["routed tokens"], waited + by_purpose["updated weights"]


def _seconds(device: Device, sent: Sent) -> float:
    # The two kinds of links are used at the same time.
    return max(sent.within / device.link, sent.between / device.network) / NETWORK
