"""One training step, the same for every engine. L MoE layers, E experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from qsparse_moe.data.batch import IGNORED_LABEL, Batch
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import measured_energies
from qsparse_moe.moe.router import bias_update_rate
from qsparse_moe.sparsity.stats import add_stats
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import Engine
from qsparse_moe.training.monitor.layer_gradients import layer_squares
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard, Requests
from qsparse_moe.training.monitor.phases import PhaseClock
from qsparse_moe.training.monitor.skipped_steps import StepFilter

Sums = dict[str, Tensor]

_ROUTED = "router/routed_LE"


@dataclass
class StepTotals:
    """Sums over the micro-batches of one step on this rank; ``reduced`` returns those of all ranks."""

    losses: Sums = field(default_factory=dict)
    """Means over a rank's micro-batches by name, float64; summed over the ranks in ``reduced``."""
    stats: Sums = field(default_factory=dict)
    """Sums of ``ModelOutput.stats`` by name."""
    layer_squares_L: Tensor | None = None
    """Sum of squares of each layer's gradients."""
    earlier_routed_LE: Tensor | None = None
    """Number of tokens routed to each expert in the steps between the last report and this step."""

    def add(self, output: ModelOutput, *, num_micro_batches: int, report: bool) -> None:
        """Add one micro-batch; without a report its stats contain only the tokens routed to each expert."""
        # Also without a report: the routers' biases and the monitor of dead experts need the routed tokens.
        self.stats = add_stats(self.stats, output.stats)
        if report:
            assert output.loss is not None
            # In float64, so that the split into micro-batches and ranks does not show in the reported mean.
            losses = {"loss": output.loss.detach()} | output.losses
            self.losses = add_stats(self.losses, {name: v.double() / num_micro_batches for name, v in losses.items()})

    def reduced(self, distributed: Distributed) -> StepTotals:
        """Return the totals over all ranks, on the CPU; see ``reduce_tensors``. All ranks must call it together."""
        # Sorted by name, because all ranks must reduce in the same order.
        losses, stats = sorted(self.losses), sorted(self.stats)
        tensors = [self.losses[name] for name in losses] + [self.stats[name] for name in stats]
        tensors += [x for x in (self.layer_squares_L, self.earlier_routed_LE) if x is not None]
        found = iter(reduce_tensors(tensors, distributed))
        return StepTotals(
            losses={name: next(found) for name in losses},
            stats={name: next(found) for name in stats},
            layer_squares_L=None if self.layer_squares_L is None else next(found),
            earlier_routed_LE=None if self.earlier_routed_LE is None else next(found),
        )


@dataclass(frozen=True)
class StepResult:
    """The result of one step; all fields but ``routed_LE`` are the same on every rank."""

    losses: dict[str, float] | None
    """Means over the global batch by name; None without a report."""
    stats: Sums | None
    """The model's sums over micro-batches and ranks, float64 on the CPU; None without a report."""
    routed_LE: Tensor | None
    """Number of this rank's tokens routed to each expert, on the device; None in a model without experts."""
    routed_since_report_LE: Tensor | None
    """Number of tokens of all ranks routed to each expert since the last report, including this step, on the CPU; None
    without a report and in a model without experts."""
    grad_norm: float
    """Norm before clipping; infinite in a step that fp16 skipped, and perhaps not finite in one that was skipped for
    another reason."""
    layer_grad_norms: tuple[float, ...] | None
    """Norm of each layer's matrices before clipping; None unless requested, and in a step that was skipped."""
    loss_scale: float | None
    """Scale of every micro-batch's mean loss in fp16; None in other precisions."""
    stop: int
    """Highest ``stop`` of all ranks: a signal, ``non_finite.CANNOT_CONTINUE``, or 0."""
    save: bool = False
    """Whether any rank requests a checkpoint after the step."""
    skipped: bool = False
    """Whether the step filter kept the gradient from the weights."""


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    *,
    step: int,
    learning_rate: float,
    guard: NonFiniteGuard,
    report: bool,
    step_filter: StepFilter | None = None,
    layer_gradients: bool = False,
    earlier_routed_LE: Tensor | None = None,
    weighs_targets: bool = False,
    requests: Callable[[], Requests] = Requests,
    clock: PhaseClock | None = None,
) -> StepResult:
    """Accumulate the gradients of the micro-batches, then update the weights and the biases that balance the experts.

    Args:
        engine: the model and its optimizer.
        batches: this rank's micro-batches of the step.
        step: number of the step, counted from 1 as in the reports, for messages.
        learning_rate: learning rate of this step.
        guard: checks the output and the gradient of every layer.
        report: reduce losses and stats over the ranks, which costs one collective and the model's statistics.
        step_filter: decides whether the step is skipped, which needs a guard that does not raise; None: no step is.
        layer_gradients: report the gradient norm of each layer's matrices as well; without a report it has no effect.
        earlier_routed_LE: sum of ``routed_LE`` over the steps since the last report, which a report reduces together
            with those of this step.
        weighs_targets: make the loss the mean over the targets of all micro-batches and ranks, which may have different
            numbers of them; the same on every rank.
        requests: returns whether this rank asks for a stop or a checkpoint after the step; called after the last
            backward pass, when the data of the next step has had the longest time to arrive.
        clock: measures the phases of the step.

    Raises:
        TrainingDiverged: a value is not finite. It is raised on all ranks; the weights are unchanged, or changed but
            not saved.
    """
    assert len(batches) == engine.num_micro_batches, (len(batches), engine.num_micro_batches)
    clock = clock or PhaseClock(engine.distributed.device)
    if weighs_targets:
        batches = weighted(batches, engine.distributed)
    totals = _accumulate(engine, batches, guard=guard, report=report, clock=clock)
    # Before the update: a forward pass or gradient that is not finite must not reach the weights.
    mine = requests()
    all_requests = guard.check(step, stop=mine.stop, save=mine.save)
    if report and layer_gradients:
        totals.layer_squares_L = layer_squares(engine)
    # Read before the update, which may change it for the next step.
    loss_scale = None if engine.loss_scaler is None else engine.loss_scaler.scale
    with clock.part("update"):
        skipped_norm = None if step_filter is None else step_filter.skips(engine, step, fault=guard.fault)
        grad_norm = engine.update(learning_rate) if skipped_norm is None else _skip(engine, skipped_norm)
    skipped = skipped_norm is not None
    if not skipped:
        # Only after the update: DeepSpeed computes the norm within its step.
        guard.check_norm(step, grad_norm)
    routed_LE = totals.stats.get(_ROUTED)
    totals.earlier_routed_LE = earlier_routed_LE
    reduced = totals.reduced(engine.distributed) if report else None
    if not skipped:
        _update_router_bias(engine, routed_LE, None if reduced is None else reduced.stats.get(_ROUTED), step)
        _update_shared_sets(engine, totals, reduced)
    if reduced is None:
        return StepResult(None, None, routed_LE, None, grad_norm, None, loss_scale, *all_requests, skipped)
    # Each rank's loss is a mean over its micro-batches, so the sum over the ranks is divided by their number.
    return StepResult(
        {name: value.item() / engine.distributed.world_size for name, value in reduced.losses.items()},
        reduced.stats,
        routed_LE,
        _routed_since_report(reduced),
        grad_norm,
        _layer_norms(reduced, grad_norm),
        loss_scale,
        *all_requests,
        skipped,
    )


def _skip(engine: Engine, grad_norm: float) -> float:
    engine.skip()
    return grad_norm


def weighted(batches: Sequence[Batch], distributed: Distributed) -> list[Batch]:
    """Return the micro-batches with weights by which the mean of their losses is the mean over all targets.

    The mean is over the micro-batches of all ranks, which must call this together. Without this, the targets of a
    micro-batch that has few of them would count more than others.
    """
    counts = torch.stack([(batch.targets_BS != IGNORED_LABEL).sum() for batch in batches])
    total = distributed.all_reduce(counts.sum().to(distributed.device)).cpu()
    num_batches = len(batches) * distributed.world_size
    # A step without any target has no loss to divide.
    weights = (counts.double() * num_batches / total.clamp(min=1)).float()
    return [batch._replace(loss_weight=weight) for batch, weight in zip(batches, weights, strict=True)]


def _accumulate(
    engine: Engine, batches: Sequence[Batch], *, guard: NonFiniteGuard, report: bool, clock: PhaseClock
) -> StepTotals:
    """Run forward and backward of every micro-batch and return the sums over them."""
    totals = StepTotals()
    for index, batch in enumerate(batches):
        with clock.part("forward"):
            # Nobody reads the logits of a step, and those of a large vocabulary need more memory than all layers.
            output = engine.forward(batch, with_stats=report, with_logits=False, layer_hook=guard.layer_hook)
        assert output.loss is not None
        guard.add_loss(output.loss)
        with clock.part("backward"):
            # In the last one the torch engine averages over the ranks; DeepSpeed counts the micro-batches itself.
            engine.backward(output.loss, is_last=index == len(batches) - 1)
        totals.add(output, num_micro_batches=len(batches), report=report)
    return totals


def _routed_since_report(reduced: StepTotals) -> Tensor | None:
    routed_LE, earlier_LE = reduced.stats.get(_ROUTED), reduced.earlier_routed_LE
    return routed_LE if routed_LE is None or earlier_LE is None else routed_LE + earlier_LE


def _layer_norms(reduced: StepTotals, grad_norm: float) -> tuple[float, ...] | None:
    squares_L = reduced.layer_squares_L
    # After an overflow in fp16 the gradients of layers are infinite or NaN and have no meaning.
    return tuple(squares_L.sqrt().tolist()) if squares_L is not None and math.isfinite(grad_norm) else None


def _update_router_bias(engine: Engine, routed_LE: Tensor | None, reduced_LE: Tensor | None, step: int) -> None:
    """Update the routers' biases, if they have any, from the routed tokens of all ranks, without a synchronization.

    This also happens in a step that fp16 skips, because its tokens were routed all the same. ``reduced_LE`` is the sum
    over all ranks if a report has reduced it already.
    """
    # The schedule of the rate counts steps from 0.
    rate = bias_update_rate(engine.model.config.moe, step - 1)
    if rate and routed_LE is not None:
        # A copy: all_reduce works in place, and routed_LE is reported as this rank's own.
        all_LE = engine.distributed.all_reduce(routed_LE.clone()) if reduced_LE is None else reduced_LE.to(routed_LE)
        engine.model.update_router_bias(all_LE, rate)


def _update_shared_sets(engine: Engine, totals: StepTotals, reduced: StepTotals | None) -> None:
    """Add the energies that the step has measured, if any, to the running averages: those of all ranks at once."""
    measured = measured_energies(totals.stats if reduced is None else reduced.stats)
    if not measured:
        return
    if reduced is None:
        parts = reduce_tensors([measured[name] for name in sorted(measured)], engine.distributed)
        measured = dict(zip(sorted(measured), parts, strict=True))
    engine.model.update_shared_sets(measured)


def reduce_tensors(tensors: Sequence[Tensor], distributed: Distributed) -> list[Tensor]:
    """Return the sums of the ranks' tensors, float64 on the CPU; bool tensors are combined by "or".

    All numbers are reduced in one collective and all flags in another; a collective without tensors is skipped. All
    ranks must pass tensors of the same shapes and dtypes in the same order.
    """
    # float64 keeps counts of tokens exact; the maximum of bytes is "or", which not every backend has for bool.
    flags = [x for x in tensors if x.dtype == torch.bool]
    numbers = [x.double() for x in tensors if x.dtype != torch.bool]
    added = iter(_reduce(numbers, distributed, dist.ReduceOp.SUM))
    either = iter(_reduce([x.byte() for x in flags], distributed, dist.ReduceOp.MAX))
    return [next(either).bool() if x.dtype == torch.bool else next(added) for x in tensors]


def _reduce(tensors: Sequence[Tensor], distributed: Distributed, op: dist.ReduceOp.RedOpType) -> list[Tensor]:
    """Reduce tensors of one dtype over the ranks in one collective and return the results on the CPU."""
    if not tensors:
        return []
    # One flat tensor: a collective per tensor would cost its latency each time, as would a copy to the CPU.
    flat = distributed.all_reduce(torch.cat([x.flatten() for x in tensors]), op).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
