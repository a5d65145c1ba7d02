"""Bytes that one rank sends in a step, by collective, within its node and to other nodes; it receives as many.

Collectives are counted as rings: a rank sends (g - 1) / g of the tensor in an all-gather or reduce-scatter over g
ranks, twice that in an all-reduce. Ranks are numbered node by node, as the launcher does, and of what the ranks of a
node send in a ring over several nodes, one part in ``local`` (the group's ranks in a node) leaves the node. In an
all-to-all every rank sends to every other one.

The reductions are those of DeepSpeed 0.19: ZeRO-1 all-reduces whole gradients in fp32 once a step, ZeRO-2 in every
micro-batch; ZeRO-3 reduce-scatters them in every micro-batch, and gathers weights as ``zero3_gathers`` counts. An
expert-parallel layer sends the rows of its tokens to their experts and back, and the same for the gradients; what is
recomputed is sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qsparse_moe.accounting.experts_per_token import planned_experts
from qsparse_moe.accounting.layout_counts import FP32, LayoutCounts, layout_counts
from qsparse_moe.accounting.zero3_gathers import zero3_gathers
from qsparse_moe.config.schema import RunConfig


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a step in one kind of collective, at even load of the experts."""

    collective: str
    purpose: str
    within: float
    """To ranks of the same node."""
    between: float
    """To ranks of other nodes."""

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.within + self.between


_PARTS = ("within", "between")


@dataclass(frozen=True)
class _Group:
    """A group of ranks that a collective runs over."""

    size: int
    local: int
    """Number of its ranks in one node."""

    def ring(self, collective: str, purpose: str, num_bytes: float) -> Sent:
        """Return what a rank sends of a tensor of ``num_bytes``; an all-reduce passes it twice."""
        passes = 2 if collective == "all_reduce" else 1
        total = passes * num_bytes * (self.size - 1) / self.size
        between = total / self.local if self.size > self.local else 0.0
        return Sent(collective, purpose, total - between, between)

    def exchange(self, purpose: str, num_bytes: float) -> Sent:
        """Return what a rank sends of its own ``num_bytes`` in an all-to-all with even parts."""
        part = num_bytes / self.size
        return Sent("all_to_all_single", purpose, part * (self.local - 1), part * (self.size - self.local))


def sent_bytes(config: RunConfig, ranks: int, nodes: int = 1) -> tuple[Sent, ...]:
    """Return what a rank sends in a step, by collective and purpose; kinds without any bytes are left out."""
    counts = layout_counts(config, ranks)
    training = config.training
    micro_batches = training.global_batch_size // (training.micro_batch_size * ranks)
    parallel, per_node = training.expert_parallel_size, ranks // nodes
    everyone = _Group(ranks, per_node)
    # The ranks that hold the same experts are P apart.
    same_experts = _Group(ranks // parallel, max(1, per_node // parallel))
    found = [
        *_state(config, counts, everyone, same_experts, micro_batches),
        *_routed(config, _Group(parallel, min(parallel, per_node)), micro_batches),
    ]
    kinds = dict.fromkeys((sent.collective, sent.purpose) for sent in found if sent.total)
    return tuple(
        Sent(
            *kind,
            *(sum(getattr(sent, part) for sent in found if (sent.collective, sent.purpose) == kind) for part in _PARTS),
        )
        for kind in kinds
    )


def _state(
    config: RunConfig, counts: LayoutCounts, everyone: _Group, same_experts: _Group, micro_batches: int
) -> Iterator[Sent]:
    """Yield what is sent of gradients and weights."""
    parts = ((everyone, counts.dense), (same_experts, counts.experts))
    reductions = micro_batches if counts.stage >= 2 else 1
    reduce = "reduce_scatter_tensor" if counts.stage == 3 else "all_reduce"
    for group, size in parts:
        yield group.ring(reduce, "gradients", FP32 * size * reductions)
    if counts.stage in (1, 2):
        for group, size in parts:
            yield group.ring("all_gather_into_tensor", "updated weights", counts.width * size)
    elif counts.stage == 3:
        gathers = zero3_gathers(config, everyone.size)
        for group, size in ((everyone, gathers.dense), (same_experts, gathers.experts)):
            yield group.ring("all_gather_into_tensor", "gathered weights", counts.width * size * micro_batches)
        # What stays gathered is gathered once more after the update.
        yield everyone.ring("all_gather_into_tensor", "updated weights", counts.width * gathers.persistent)


def _routed(config: RunConfig, group: _Group, micro_batches: int) -> Iterator[Sent]:
    if group.size == 1:
        return
    model, training = config.model, config.training
    # At the end of the schedule; before it, tokens may use more experts.
    rows = training.micro_batch_size * config.data.sequence_length * sum(planned_experts(model).values())
    width = FP32 if training.precision == "fp32" else 2
    recomputed = training.activation_checkpointing in ("full", "selective", "feed_forward")
    # Tokens to their experts and back, forward and backward, and forward once more where it is recomputed.
    times = 6 if recomputed else 4
    num_bytes = times * rows * model.hidden_size * width * micro_batches
    yield group.exchange("routed tokens", num_bytes)


def checkpoint_seconds(num_bytes: float, nodes: int, disk: float) -> float:
    """Return the seconds in which ``nodes`` write a checkpoint, each ``disk`` bytes per second."""
    return num_bytes / (nodes * disk)
